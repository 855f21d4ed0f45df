//! How a pipeline runs, and what it did.

use std::fmt;
use std::sync::Arc;

use tonnage_device::Pool;
use tonnage_device::gds::Use;

use crate::control::{Cancel, Check, Progress};
use crate::strategy::Strategy;

/// Called after each block, from the threads that work.
pub type SharedProgress = Arc<dyn Fn(Progress) + Send + Sync>;

/// How a pipeline runs. The default suits a local disk.
#[derive(Clone)]
pub struct PipelineOptions {
    /// Bytes of staging memory at most: threads × slots × bytes of a slot.
    pub staging: u64,
    /// Bytes of a slot; by default what fits the budget, [`PipelineOptions::SLOT`] at most.
    pub slot: Option<usize>,
    /// Threads that read; by default one for each core, at least 2.
    pub threads: Option<usize>,
    /// How bytes are read. Views and maps are for the host: they count as [`Strategy::Buffered`] here.
    pub strategy: Strategy,
    /// Ends the run. It is noticed within milliseconds.
    pub cancel: Cancel,
    /// Where slots come from.
    pub pool: Arc<Pool>,
    /// Told how far the run is.
    pub progress: Option<SharedProgress>,
    /// Bytes that will be submitted in all, for progress; what has been submitted so far, if `None`.
    pub total: Option<u64>,
    /// Looks at each block that is read, before it goes to the device.
    pub check: Option<Arc<dyn Check + Send + Sync>>,
    /// Whether whole pages of large pieces go from a file straight to a CUDA device, past the host. With a
    /// [`PipelineOptions::check`] they do not.
    pub gds: Use,
}

impl Default for PipelineOptions {
    fn default() -> Self {
        PipelineOptions {
            staging: Pool::CAPACITY,
            slot: None,
            threads: None,
            strategy: Strategy::Auto,
            cancel: Cancel::new(),
            pool: Arc::clone(Pool::global()),
            progress: None,
            total: None,
            check: None,
            gds: Use::Off,
        }
    }
}

impl fmt::Debug for PipelineOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PipelineOptions")
            .field("staging", &self.staging)
            .field("slot", &self.slot)
            .field("threads", &self.threads)
            .field("strategy", &self.strategy)
            .field("cancel", &self.cancel)
            .field("pool", &self.pool)
            .field("progress", &self.progress.is_some())
            .field("total", &self.total)
            .field("check", &self.check.is_some())
            .field("gds", &self.gds)
            .finish()
    }
}

/// The ring: how many threads, how large a slot, how many bytes of slots a thread may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ring {
    pub threads: usize,
    pub slot: usize,
    /// Slots of one thread at most.
    pub slots: usize,
}

impl PipelineOptions {
    /// Bytes of a slot at most. Measured: from 4 MiB on, a local disk is at its limit; and page-locking costs
    /// 0.45 ms a MiB, so that a larger ring slows the first load (H100, 4 GiB cached, 16 threads: 42 GB/s
    /// with 2 × 4 MiB a thread, 37 GB/s with 8 MiB).
    pub const SLOT: usize = 4 << 20;
    /// Slots of a thread by default: one is read into while the other is copied.
    const SLOTS: usize = 2;
    /// Bytes of a slot at least; below, calls cost more than copies.
    pub const MIN_SLOT: usize = 64 << 10;
    /// The smallest budget: two slots for one thread.
    pub const MIN_STAGING: u64 = 2 * Self::MIN_SLOT as u64;
    /// A page, which slots are multiples of.
    const PAGE: usize = 4096;
    /// Below this, rather fewer threads than smaller slots.
    const GOOD_SLOT: u64 = 2 << 20;

    /// What fits the budget; `None` if nothing does.
    pub(super) fn ring(&self, wanted_threads: usize) -> Option<Ring> {
        if self.staging < Self::MIN_STAGING {
            return None;
        }
        let pages = |bytes: u64| bytes / Self::PAGE as u64 * Self::PAGE as u64;
        let mut threads = self.threads.unwrap_or(wanted_threads).clamp(1, 64) as u64;
        let fixed = self.slot.map(|slot| {
            let slot = (slot as u64).clamp(Self::PAGE as u64, self.staging / 2);
            pages(slot).max(Self::PAGE as u64)
        });
        // Two slots a thread: one is read into while the other is copied.
        let least = fixed.unwrap_or(if self.threads.is_some() {
            Self::MIN_SLOT as u64
        } else {
            Self::GOOD_SLOT.min(self.staging / 2)
        });
        threads = threads.min(self.staging / (2 * least)).max(1);
        let share = self.staging / threads;
        let slot = fixed.unwrap_or_else(|| pages((share / 2).min(Self::SLOT as u64)));
        Some(Ring {
            threads: usize::try_from(threads).ok()?,
            slot: usize::try_from(slot).ok()?,
            slots: if fixed.is_some() {
                usize::try_from(share / slot).ok()?.max(Self::SLOTS)
            } else {
                Self::SLOTS
            },
        })
    }
}

/// What a pipeline did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DeviceReport {
    /// From the start to the end.
    pub seconds: f64,
    /// Bytes that were wanted of the sources.
    pub bytes: u64,
    /// Bytes that were read, with what alignment and rows brought along.
    pub bytes_read: u64,
    /// Of these, past the page cache.
    pub bytes_direct: u64,
    /// Of these, straight to a device, by GPUDirect Storage.
    pub bytes_gds: u64,
    /// Calls that read.
    pub reads: u64,
    /// Copies to the device.
    pub transfers: u64,
    /// Bytes of staging memory at most at a time.
    pub peak_staging: u64,
    /// Threads that read.
    pub threads: usize,
    /// The way taken: "direct", "buffered", or both; "gds" where most bytes went straight to a device.
    pub strategy: &'static str,
    /// Why.
    pub reason: String,
}

impl DeviceReport {
    /// Gigabytes (10^9) a second; 0 for a run too short to time.
    pub fn gb_per_s(&self) -> f64 {
        if self.seconds > 0.0 {
            self.bytes as f64 / self.seconds / 1e9
        } else {
            0.0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(staging: u64, slot: Option<usize>, threads: Option<usize>) -> Option<Ring> {
        let options = PipelineOptions {
            staging,
            slot,
            threads,
            ..Default::default()
        };
        options.ring(8)
    }

    #[test]
    fn the_ring_fits_every_budget() {
        for staging in [
            128 << 10,
            200_000,
            1 << 20,
            16 << 20,
            64 << 20,
            256 << 20,
            1 << 40,
        ] {
            for slot in [None, Some(0), Some(4096), Some(100_000), Some(1 << 30)] {
                for threads in [None, Some(0), Some(1), Some(4), Some(1000)] {
                    let ring = ring(staging, slot, threads).unwrap();
                    let Ring {
                        threads,
                        slot,
                        slots,
                    } = ring;
                    assert!(
                        (threads * slots * slot) as u64 <= staging,
                        "{staging}: {ring:?}"
                    );
                    assert!(threads >= 1 && slots >= 2 && slot >= 4096 && slot % 4096 == 0);
                }
            }
        }
        assert_eq!(ring(100 << 10, None, None), None);
        let sixteen = ring(16 << 20, None, None).unwrap();
        assert_eq!((sixteen.threads, sixteen.slot), (4, 2 << 20));
        let default = ring(256 << 20, None, None).unwrap();
        assert_eq!(
            (default.threads, default.slot, default.slots),
            (8, 4 << 20, 2)
        );
    }
}
