//! The loader and the reference package, in turn.

use std::sync::Arc;
use std::time::Instant;

use tonnage::device::{Device, Kind};
use tonnage::{Checkpoint, DeviceLoad, ErrorKind, Load, TensorRef};

use super::devices::{self, Targets};
use super::machine::{self, Stretch};
use super::reference::{Files, Reference};
use super::report::{Loads, Report, State, Who};
use crate::exit::Failure;
use crate::terminal::cancel;

/// What is measured, and with what.
#[derive(Debug)]
pub struct Bench<'a> {
    /// The user's own.
    pub checkpoint: &'a Checkpoint,
    /// What of it is loaded.
    pub tensors: &'a [TensorRef<'a>],
    /// Where that lies.
    pub stretches: &'a [Stretch<'a>],
    /// The other side.
    pub reference: Option<Reference>,
    /// Measurements of each kind.
    pub rounds: usize,
    /// No round begins after this, but the first.
    pub end: Option<Instant>,
    /// Where to.
    pub targets: Targets,
}

/// One kind of load.
struct Case {
    state: State,
    /// The host, if there is none.
    device: Option<Arc<dyn Device>>,
    who: Who,
}

impl Case {
    fn to(&self) -> String {
        self.device
            .as_ref()
            .map_or_else(|| "cpu".to_owned(), |device| device.info().id.to_string())
    }
}

/// What frameworks call a device, where they know it: ROCm's are `cuda` to them.
fn in_frameworks(device: &Arc<dyn Device>) -> Option<String> {
    let id = device.info().id;
    matches!(id.kind, Kind::Cuda | Kind::Rocm).then(|| format!("cuda:{}", id.index))
}

/// The way that was taken, and why.
type Way = (String, String);

impl Bench<'_> {
    /// What the machine can do.
    ///
    /// # Errors
    /// What the system said.
    pub fn limits(&self, report: &mut Report) -> Result<(), Failure> {
        /// Of the checkpoint; the disk is read this much four times.
        const MOST: u64 = 1 << 30;
        report.limits.extend(machine::memory()?);
        self.go_on()?;
        let disk = machine::disk(self.stretches, MOST)?;
        if disk.is_empty() {
            let text =
                "the disk's limit is not known: the file system has no reads past the page cache";
            report.notes.push(text.to_owned());
        }
        report.limits.extend(disk);
        self.go_on()?;
        machine::warm(self.stretches)?;
        report
            .limits
            .extend(machine::page_cache(self.stretches, MOST)?);
        for device in &self.targets.devices {
            self.go_on()?;
            match devices::copies(device) {
                Ok(limits) => report.limits.extend(limits),
                Err(failed) => report.notes.push(failed.message()),
            }
        }
        self.go_on()
    }

    fn go_on(&self) -> Result<(), Failure> {
        if cancel().is_cancelled() {
            return Err(Failure::Cancelled);
        }
        Ok(())
    }

    /// Every load, in rounds.
    ///
    /// # Errors
    /// What the loader said; the reference's failures are part of the report.
    pub fn loads(&mut self, report: &mut Report) -> Result<(), Failure> {
        let mut states = vec![State::Cold, State::Warm];
        if !machine::evict(self.stretches) {
            states.remove(0);
            let text = "no cold loads: the checkpoint cannot be dropped from memory (a file system in \
                        memory, or somebody has it mapped)";
            report.notes.push(text.to_owned());
        }
        let cases = self.cases(&states);
        let bytes = self.tensors.iter().map(TensorRef::byte_len).sum();
        let none = |case: &Case| Loads::new(case.who, case.state, &case.to(), bytes);
        report.loads = cases.iter().map(none).collect();
        for round in 0..self.rounds {
            if round > 0 && self.end.is_some_and(|end| Instant::now() > end) {
                report.notes.push(format!(
                    "{round} of {} rounds: the time was up",
                    self.rounds
                ));
                break;
            }
            // Sides take turns at going first, so that neither always finds what the other left.
            let mut order: Vec<usize> = (0..cases.len()).collect();
            if round % 2 == 1 {
                order.reverse();
            }
            for at in order {
                if let (Some(case), Some(loads)) = (cases.get(at), report.loads.get_mut(at)) {
                    self.go_on()?;
                    self.measure(case, loads)?;
                }
            }
        }
        Ok(())
    }

    fn cases(&self, states: &[State]) -> Vec<Case> {
        let host = self.targets.host.then_some(None);
        let devices = self.targets.devices.iter().map(Some);
        let reference = |device: Option<&Arc<dyn Device>>| match (&self.reference, device) {
            (Some(_), None) => true,
            (Some(reference), Some(device)) => reference.cuda && in_frameworks(device).is_some(),
            (None, _) => false,
        };
        let mut cases = Vec::new();
        for device in host.into_iter().chain(devices) {
            for &state in states {
                let case = |who| Case {
                    state,
                    device: device.cloned(),
                    who,
                };
                cases.push(case(Who::Tonnage));
                if reference(device) {
                    cases.push(case(Who::Reference));
                }
            }
        }
        cases
    }

    fn measure(&mut self, case: &Case, loads: &mut Loads) -> Result<(), Failure> {
        if loads.failed.is_some() {
            return Ok(());
        }
        match case.state {
            State::Cold => drop(machine::evict(self.stretches)),
            State::Warm => machine::warm(self.stretches)?,
        }
        let done = match (case.who, &case.device) {
            (Who::Tonnage, None) => self.to_host(),
            (Who::Tonnage, Some(device)) => self.to_device(device),
            (Who::Reference, device) => {
                let files = self.files();
                let name = device.as_ref().and_then(in_frameworks);
                let Some(reference) = &mut self.reference else {
                    return Ok(());
                };
                match reference.load(&files, name.as_deref().unwrap_or("cpu")) {
                    Ok(seconds) => loads.seconds.push(seconds),
                    Err(why) => loads.failed = Some(why),
                }
                return Ok(());
            }
        };
        match done {
            Ok((seconds, way)) => {
                loads.seconds.push(seconds);
                loads.strategy = Some(way);
                Ok(())
            }
            // A device without room says nothing about the others.
            Err(Failure::Library(error)) if error.kind() == ErrorKind::Device => {
                loads.failed = Some(error.to_string());
                Ok(())
            }
            Err(failed) => Err(failed),
        }
    }

    /// Names of what is loaded; none where that is everything.
    fn names(&self) -> Vec<String> {
        if self.tensors.len() == self.checkpoint.len() {
            return Vec::new();
        }
        self.tensors
            .iter()
            .map(|tensor| tensor.name().to_owned())
            .collect()
    }

    /// The same for the reference, which knows files.
    fn files(&self) -> Files {
        let mut files: Files = Vec::new();
        for tensor in self.tensors {
            let label = self
                .checkpoint
                .files()
                .get(tensor.file())
                .map_or("", |file| &file.label);
            match files.iter_mut().find(|(path, _)| path == label) {
                Some((_, names)) => names.push(tensor.name().to_owned()),
                None => files.push((label.to_owned(), vec![tensor.name().to_owned()])),
            }
        }
        files
    }

    /// Into memory, until every byte has been read once.
    fn to_host(&self) -> Result<(f64, Way), Failure> {
        let load = Load {
            select: self.names(),
            cancel: Some(cancel()),
            ..Load::default()
        };
        let start = Instant::now();
        let loaded = self.checkpoint.load(&load)?;
        let total = loaded
            .iter()
            .map(|(_, bytes)| sum(bytes))
            .fold(0, u64::wrapping_add);
        std::hint::black_box(total);
        let seconds = start.elapsed().as_secs_f64();
        let report = loaded.report();
        Ok((
            seconds,
            (report.strategy.to_owned(), report.reason.to_owned()),
        ))
    }

    /// To a device, until the last copy is over.
    fn to_device(&self, device: &Arc<dyn Device>) -> Result<(f64, Way), Failure> {
        let load = DeviceLoad {
            select: self.names(),
            cancel: cancel().clone(),
            ..DeviceLoad::default()
        };
        let start = Instant::now();
        let loaded = self.checkpoint.load_to(device, &load)?;
        let seconds = start.elapsed().as_secs_f64();
        let report = loaded.report();
        Ok((seconds, (report.strategy.to_owned(), report.reason.clone())))
    }
}

/// Reads every byte: the sum of all words, and of the bytes that are left.
fn sum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    let words = words.iter().fold(0_u64, |sum, word| {
        sum.wrapping_add(u64::from_le_bytes(*word))
    });
    rest.iter()
        .fold(words, |sum, &byte| sum.wrapping_add(u64::from(byte)))
}

#[cfg(test)]
mod tests {
    use super::sum;

    #[test]
    fn every_byte_counts() {
        assert_eq!(sum(&[]), 0);
        assert_eq!(sum(&[1; 9]), 0x0101_0101_0101_0101 + 1);
        let mut bytes = vec![0; 33];
        for at in 0..bytes.len() {
            bytes[at] = 1;
            assert_ne!(sum(&bytes), 0, "{at}");
            bytes[at] = 0;
        }
    }
}
