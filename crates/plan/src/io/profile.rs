//! What is known of where bytes come from: enough to choose between reading little and reading seldom.

/// Speeds of a place that bytes are read from, and how it is read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct IoProfile {
    /// Its name.
    pub name: &'static str,
    /// Bytes a second of large reads.
    pub bandwidth: f64,
    /// Seconds that a request takes besides its bytes.
    pub latency: f64,
    /// Requests under way at a time.
    pub depth: f64,
    /// Bytes a second of copies from memory to memory.
    pub memcpy: f64,
    /// Bytes that a request brings at least: what lies around a short run comes with it.
    pub page: u64,
    /// Bytes of the blocks that are read whole.
    pub block: u64,
}

impl IoProfile {
    /// A disk of this machine, past its cache: 7 GB/s, 80 µs, and as many requests under way as threads read it
    /// (four; 64 of them would need a queue of short requests, which a load of whole blocks never fills).
    pub const NVME: IoProfile = IoProfile {
        name: "nvme",
        bandwidth: 7e9,
        latency: 80e-6,
        depth: 4.0,
        memcpy: 10e9,
        page: 4096,
        block: 8 << 20,
    };
    /// A network file system.
    pub const NFS: IoProfile = IoProfile {
        name: "nfs",
        bandwidth: 2e9,
        latency: 500e-6,
        depth: 16.0,
        memcpy: 10e9,
        page: 4096,
        block: 8 << 20,
    };
    /// An object store.
    pub const S3: IoProfile = IoProfile {
        name: "s3",
        bandwidth: 5e9,
        latency: 30e-3,
        depth: 64.0,
        memcpy: 10e9,
        page: 0,
        block: 64 << 20,
    };
    /// A file that the page cache has. Fits what was measured with runs of 2.7 and 11 KiB of a matrix of 512 MiB:
    /// 30 and 53 ms read run by run, 81 and 66 ms in blocks.
    pub const PAGE_CACHE: IoProfile = IoProfile {
        name: "page_cache",
        bandwidth: 7.4e9,
        latency: 0.7e-6,
        depth: 1.0,
        memcpy: 10e9,
        page: 0,
        block: 1 << 20,
    };
    /// Every profile that has a name.
    pub const ALL: [IoProfile; 4] = [
        IoProfile::NVME,
        IoProfile::NFS,
        IoProfile::S3,
        IoProfile::PAGE_CACHE,
    ];

    /// The profile of this name.
    pub fn named(name: &str) -> Option<IoProfile> {
        Self::ALL.into_iter().find(|profile| profile.name == name)
    }

    /// Unwanted bytes between two wanted ones up to which one request is faster than two.
    pub fn gap(&self) -> u64 {
        (self.bandwidth * self.latency / self.depth) as u64
    }

    /// Seconds for `requests` that read `bytes` in all.
    pub(super) fn reads(&self, requests: u64, bytes: u64) -> f64 {
        requests as f64 * self.latency / self.depth + bytes as f64 / self.bandwidth
    }

    /// Seconds for copying from staging memory to where bytes belong.
    pub(super) fn scatters(&self, bytes: u64) -> f64 {
        bytes as f64 / self.memcpy
    }
}
