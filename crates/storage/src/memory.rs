//! Bytes that are in memory already.

use std::fmt;
use std::sync::Arc;

use crate::Error;
use crate::source::{Source, check};

/// A source over owned or shared bytes; [`Source::bytes`] is always there.
pub struct MemorySource {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    label: String,
}

impl MemorySource {
    /// A source over bytes: a `Vec<u8>`, an `Arc<[u8]>` …
    pub fn new(bytes: impl Into<Arc<[u8]>>, label: impl Into<String>) -> Self {
        Self::from_owner(Arc::new(bytes.into()), label)
    }

    /// A source over whatever owns the bytes and always shows the same ones.
    pub fn from_owner(owner: Arc<dyn AsRef<[u8]> + Send + Sync>, label: impl Into<String>) -> Self {
        MemorySource {
            owner,
            label: label.into(),
        }
    }

    fn all(&self) -> &[u8] {
        (*self.owner).as_ref()
    }
}

impl fmt::Debug for MemorySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemorySource")
            .field("label", &self.label)
            .field("len", &self.len())
            .finish()
    }
}

impl Source for MemorySource {
    fn label(&self) -> &str {
        &self.label
    }

    fn len(&self) -> u64 {
        self.all().len() as u64
    }

    fn read_exact_at(&self, offset: u64, dst: &mut [u8]) -> Result<(), Error> {
        let all = self.all();
        let end = check(&self.label, offset, dst.len(), all.len() as u64)?;
        // `end` is at most the length of a slice, so both fit.
        dst.copy_from_slice(&all[offset as usize..end as usize]);
        Ok(())
    }

    fn bytes(&self) -> Option<&[u8]> {
        Some(self.all())
    }
}
