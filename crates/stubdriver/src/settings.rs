//! What can be set: by variables of the environment, read when the driver starts, or by a test's text.
//!
//! | variable, or key without `STUB_` | default | what |
//! |---|---|---|
//! | `STUB_DEVICES` | 1 | devices |
//! | `STUB_MEM_MIB` | 4096 | memory of each, in MiB; beyond it, error 2 |
//! | `STUB_DELAY_US` | 0 | each copy waits a random time of up to twice this |
//! | `STUB_SEED` | 1 | of those times |
//! | `STUB_BPS` | 0 | bytes per second of each stream; 0 is no limit |
//! | `STUB_FAIL_ALLOC` | 0 | the n-th device allocation fails with error 2 |
//! | `STUB_FAIL_PINNED` | 0 | the n-th page-locked allocation fails with error 2 |
//! | `STUB_FAIL_ISSUE` | 0 | the n-th copy is refused with error 1 |
//! | `STUB_FAIL_COPY` | 0 | the n-th copy fails when it runs: error 719 from then on |
//! | `STUB_LOSE_CONTEXT` | 0 | the n-th call that needs a context loses it: error 709 from then on |
//! | `STUB_GDS_OPEN` | works | what `cuFileDriverOpen` does: `works`, `fails`, `hangs`, `aborts` |
//! | `STUB_FAIL_GDS_FILE` | 0 | the n-th file is refused with error 5008 |
//! | `STUB_FAIL_GDS_BUFFER` | 0 | the n-th registration of memory fails with error 5036 |
//! | `STUB_FAIL_GDS_READ` | 0 | the n-th read of cuFile's fails with error 5044 |
//! | `STUB_SHORT_GDS_READ` | 0 | the n-th read of cuFile's gives half |
//! | `STUB_POISON` | 1 | fresh device memory is filled with 0xCD |
//! | `STUB_CHECK_SOURCE` | 1 | sources of late copies must not change before the copy |
//! | `STUB_JOURNAL` | none | a file for the journal |
//! | `STUB_EXIT_CHECK` | all | what the end of the process looks at: `all`, `memory` (device memory only), `off` |
//!
//! Counting starts at 1; 0 is never.

use std::path::PathBuf;

/// What the end of the process looks at, besides rules that were broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitCheck {
    /// Everything has to be given back.
    All,
    /// Device memory has to be given back.
    Memory,
    /// Nothing is looked at, broken rules included.
    Off,
}

/// What the start of cuFile does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GdsOpen {
    /// It starts.
    Works,
    /// It gives error 5001.
    Fails,
    /// It never returns.
    Hangs,
    /// It ends the process.
    Aborts,
}

/// The settings; see the [module](self).
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "the table above says what each is")]
pub struct Settings {
    pub devices: u64,
    pub mem_mib: u64,
    pub delay_us: u64,
    pub seed: u64,
    pub bps: u64,
    pub fail_alloc: u64,
    pub fail_pinned: u64,
    pub fail_issue: u64,
    pub fail_copy: u64,
    pub lose_context: u64,
    pub gds_open: GdsOpen,
    pub fail_gds_file: u64,
    pub fail_gds_buffer: u64,
    pub fail_gds_read: u64,
    pub short_gds_read: u64,
    pub poison: bool,
    pub check_source: bool,
    pub journal: Option<PathBuf>,
    pub exit_check: ExitCheck,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            devices: 1,
            mem_mib: 4096,
            delay_us: 0,
            seed: 1,
            bps: 0,
            fail_alloc: 0,
            fail_pinned: 0,
            fail_issue: 0,
            fail_copy: 0,
            lose_context: 0,
            gds_open: GdsOpen::Works,
            fail_gds_file: 0,
            fail_gds_buffer: 0,
            fail_gds_read: 0,
            short_gds_read: 0,
            poison: true,
            check_source: true,
            journal: None,
            exit_check: ExitCheck::All,
        }
    }
}

impl Settings {
    /// Those of the environment.
    ///
    /// # Errors
    /// A variable that is unknown or has no sense.
    pub fn from_environment() -> Result<Self, String> {
        let mut settings = Settings::default();
        for (name, value) in std::env::vars() {
            if let Some(key) = name.strip_prefix("STUB_") {
                settings.set(key, &value)?;
            }
        }
        Ok(settings)
    }

    /// Sets more of them: `KEY=value`, one a line.
    ///
    /// # Errors
    /// As [`Settings::from_environment`].
    pub fn read(&mut self, text: &str) -> Result<(), String> {
        for line in text.lines().filter(|line| !line.trim().is_empty()) {
            let (key, value) = line.split_once('=').ok_or(format!("no value: {line}"))?;
            self.set(key.trim(), value.trim())?;
        }
        Ok(())
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        let number = || {
            let parsed = value.parse::<u64>();
            parsed.map_err(|error| format!("STUB_{key}={value}: {error}"))
        };
        match key {
            "DEVICES" => self.devices = number()?,
            "MEM_MIB" => self.mem_mib = number()?,
            "DELAY_US" => self.delay_us = number()?,
            "SEED" => self.seed = number()?,
            "BPS" => self.bps = number()?,
            "FAIL_ALLOC" => self.fail_alloc = number()?,
            "FAIL_PINNED" => self.fail_pinned = number()?,
            "FAIL_ISSUE" => self.fail_issue = number()?,
            "FAIL_COPY" => self.fail_copy = number()?,
            "LOSE_CONTEXT" => self.lose_context = number()?,
            "FAIL_GDS_FILE" => self.fail_gds_file = number()?,
            "FAIL_GDS_BUFFER" => self.fail_gds_buffer = number()?,
            "FAIL_GDS_READ" => self.fail_gds_read = number()?,
            "SHORT_GDS_READ" => self.short_gds_read = number()?,
            "GDS_OPEN" => {
                self.gds_open = match value {
                    "works" => GdsOpen::Works,
                    "fails" => GdsOpen::Fails,
                    "hangs" => GdsOpen::Hangs,
                    "aborts" => GdsOpen::Aborts,
                    _ => {
                        return Err(format!(
                            "STUB_GDS_OPEN={value}: works, fails, hangs, aborts"
                        ));
                    }
                }
            }
            "POISON" => self.poison = number()? != 0,
            "CHECK_SOURCE" => self.check_source = number()? != 0,
            "JOURNAL" => self.journal = (!value.is_empty()).then(|| value.into()),
            "EXIT_CHECK" => {
                self.exit_check = match value {
                    "all" => ExitCheck::All,
                    "memory" => ExitCheck::Memory,
                    "off" => ExitCheck::Off,
                    _ => return Err(format!("STUB_EXIT_CHECK={value}: all, memory or off")),
                }
            }
            _ => return Err(format!("STUB_{key} is no setting")),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_and_nonsense_is_refused() {
        let mut settings = Settings::default();
        settings
            .read("DEVICES=2\n MEM_MIB = 64\n\nEXIT_CHECK=memory\nJOURNAL=/a/b")
            .unwrap();
        assert_eq!((settings.devices, settings.mem_mib), (2, 64));
        assert_eq!(settings.exit_check, ExitCheck::Memory);
        assert_eq!(settings.journal, Some("/a/b".into()));
        for wrong in ["DEVICES", "DEVICES=x", "SPEED=1", "EXIT_CHECK=1", "SEED=-1"] {
            assert!(settings.read(wrong).is_err(), "{wrong}");
        }
    }
}
