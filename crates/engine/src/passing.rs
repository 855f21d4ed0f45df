//! Reading a whole file only to look at it: what it brings into the page cache leaves with it.
//!
//! A check of checksums reads as much as a model has, once. Left in the cache, that would evict what others
//! need; and a file that is in the cache because others use it has to stay there.

use tonnage_storage::{Source, StorageKind};

use crate::control::Error;

/// A source that is read through, block by block.
pub(crate) struct Passing<'a> {
    source: &'a dyn Source,
    forgets: bool,
}

impl<'a> Passing<'a> {
    /// Decides by what the page cache has of the source now: later, blocks that are read ahead would look as if
    /// somebody used them.
    pub fn of(source: &'a dyn Source) -> Self {
        let cached = source.residency(0, source.len()).fraction();
        let local = source.kind() == StorageKind::Local;
        Passing {
            source,
            forgets: local && cached.is_some_and(|cached| cached < 0.5),
        }
    }

    /// Fills `dst` with the bytes from `offset` on.
    pub fn read(&self, offset: u64, dst: &mut [u8]) -> Result<(), Error> {
        let read = self.source.read_exact_at(offset, dst);
        read.map_err(|error| Error::Storage { error, offset })?;
        if self.forgets {
            self.source.forget(offset, dst.len() as u64);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use tonnage_storage::{MemorySource, Residency};

    use super::*;

    /// A file on a disk, of which the page cache has some bytes.
    #[derive(Debug)]
    struct OnDisk {
        inner: MemorySource,
        kind: StorageKind,
        cached: Residency,
        forgotten: Mutex<Vec<(u64, u64)>>,
    }

    impl Source for OnDisk {
        fn label(&self) -> &str {
            "weights.bin"
        }

        fn len(&self) -> u64 {
            self.inner.len()
        }

        fn read_exact_at(&self, offset: u64, dst: &mut [u8]) -> Result<(), tonnage_storage::Error> {
            self.inner.read_exact_at(offset, dst)
        }

        fn residency(&self, _: u64, _: u64) -> Residency {
            self.cached
        }

        fn kind(&self) -> StorageKind {
            self.kind
        }

        fn forget(&self, offset: u64, len: u64) {
            self.forgotten.lock().unwrap().push((offset, len));
        }
    }

    fn on_disk(kind: StorageKind, cached: Residency, len: usize) -> OnDisk {
        OnDisk {
            inner: MemorySource::new(vec![7; len], "bytes"),
            kind,
            cached,
            forgotten: Mutex::default(),
        }
    }

    #[test]
    fn only_what_nobody_else_uses_leaves_the_cache() {
        let none = Residency::Pages {
            cached: 0,
            total: 100,
        };
        let most = Residency::Pages {
            cached: 90,
            total: 100,
        };
        let local = StorageKind::Local;
        for (kind, cached, forgets) in [
            (local, none, true),
            (local, most, false),
            (local, Residency::Unknown, false),
            (StorageKind::Network("nfs"), none, false),
        ] {
            let source = on_disk(kind, cached, 100);
            let mut bytes = [0; 30];
            Passing::of(&source).read(20, &mut bytes).unwrap();
            assert_eq!(bytes, [7; 30]);
            let forgotten = source.forgotten.lock().unwrap();
            assert_eq!(
                forgotten.as_slice(),
                if forgets { &[(20, 30)][..] } else { &[] }
            );
        }
    }

    #[test]
    fn checks_of_whole_files_pass_through() {
        let none = Residency::Pages {
            cached: 0,
            total: 100,
        };
        let source = on_disk(StorageKind::Local, none, 20 << 20);
        crate::hash::blake3_of(&source, &crate::Options::default()).unwrap();
        crate::checksum::sum_chunks(&source, 100, (20 << 20) - 100, &crate::Options::default())
            .unwrap();
        let mut forgotten = source.forgotten.lock().unwrap().clone();
        forgotten.sort_unstable();
        let bytes: u64 = forgotten.iter().map(|(_, len)| len).sum();
        assert_eq!(bytes, (40 << 20) - 100);
    }
}
