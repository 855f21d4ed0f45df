//! A save under way.

use tonnage_engine::checksum::Sums;
use tonnage_engine::{self as engine, Check, OnProgress, Options, Progress, Put};
use tonnage_storage::{AtomicFile, Sink};

use super::backs::Backs;
use super::cast_fill::CastFill;
use super::{Content, Item, Save, data_len};
use crate::checksums::{finished, hash_of};
use crate::error::{Error, Result};
use crate::load::OnProgressOf;

/// A save under way: files one after the other, one progress.
pub(super) struct Run<'a> {
    save: &'a Save<'a>,
    /// Looks at what is read of stored tensors.
    check: Option<&'a dyn Check>,
    base: u64,
    total: u64,
    pub report: engine::Report,
}

impl<'a> Run<'a> {
    /// A save of `total` bytes.
    pub fn new(save: &'a Save<'a>, check: Option<&'a dyn Check>, total: u64) -> Self {
        Run {
            save,
            check,
            base: 0,
            total,
            report: engine::Report::default(),
        }
    }

    /// Writes the whole content of one file. The header goes last where it waits for the checksums.
    pub fn write(&mut self, file: &AtomicFile, items: &[Item<'_>]) -> Result<()> {
        let in_file = |e: Error| e.in_file(file.label());
        let layout = super::layout(items, self.save, None).map_err(in_file)?;
        let start = layout.data_start();
        file.reserve(layout.file_len)?;
        file.set_len(layout.file_len)?;
        let sums = self
            .save
            .checksums
            .then(|| Sums::new(start, data_len(&layout)));
        if sums.is_none() {
            file.write_all_at(0, &layout.header)?;
        }
        let casts = items.iter().map(|item| CastFill::of(item, self.check));
        let casts = casts.collect::<Result<Vec<_>>>()?;
        let mut backs = Backs::default();
        for item in items {
            if let Content::Device(data) = &item.content {
                backs.add(data, self.save.cancel);
            }
        }
        let downloads: Vec<_> = items.iter().map(|item| backs.fill(item)).collect();
        let mut puts = Vec::with_capacity(items.len());
        let fills = casts.iter().zip(&downloads);
        for ((item, (cast, download)), &(begin, end)) in items.iter().zip(fills).zip(&layout.ranges)
        {
            // `layout` has checked that all of the file fits 64 bits.
            let (offset, len) = (start + begin, end - begin);
            puts.push(match (item.content, cast) {
                (Content::Bytes(data), _) => Put::bytes(offset, data),
                (Content::Stored(_), Some(cast)) => Put::fill(offset, len, cast),
                (Content::Stored(tensor), None) => {
                    Put::source(offset, tensor.source()?, tensor.offset(), len)
                }
                (Content::Device(_), _) => match download {
                    Some(download) => Put::fill(offset, len, download),
                    None => Put::bytes(offset, &[]),
                },
            });
        }
        self.step(|options| engine::put(file, &puts, sums.as_ref(), options))?;
        if let Some(sums) = sums {
            let sums = finished(&sums, data_len(&layout))?;
            let sealed = super::layout(items, self.save, Some(&sums)).map_err(in_file)?;
            file.write_all_at(0, &sealed.header)?;
        }
        Ok(())
    }

    /// The file's hash, if it is to have a sidecar.
    pub fn hash(&self, file: &AtomicFile) -> Result<Option<[u8; 32]>> {
        let options = Options {
            threads: self.save.threads,
            cancel: self.save.cancel,
            ..Options::default()
        };
        let hash = self.save.sidecar.then(|| hash_of(file, &options));
        hash.transpose()
    }

    fn step(
        &mut self,
        run: impl FnOnce(&Options<'_>) -> Result<engine::Report, engine::Error>,
    ) -> Result<()> {
        let (base, total) = (self.base, self.total);
        let after = |p: Progress| {
            if let Some(OnProgressOf(progress)) = self.save.progress {
                progress(Progress {
                    done: base.saturating_add(p.done),
                    total,
                });
            }
        };
        let progress = self.save.progress.map(|_| &after as OnProgress<'_>);
        let options = Options {
            threads: self.save.threads,
            block: None,
            progress,
            cancel: self.save.cancel,
            check: self.check,
            ..Options::default()
        };
        let report = run(&options)?;
        if report.bytes > 0 || self.report.strategy.is_empty() {
            self.report.strategy = report.strategy;
        }
        self.report.bytes += report.bytes;
        self.report.threads = self.report.threads.max(report.threads);
        self.base = self.base.saturating_add(report.bytes);
        Ok(())
    }
}
