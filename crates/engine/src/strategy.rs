//! How bytes are read from storage.

use std::fmt;
use std::str::FromStr;

/// How bytes are read. [`Strategy::Auto`] suits everyone who has not measured otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Strategy {
    /// By what is known: the file system, what the page cache has, sizes, the destination.
    #[default]
    Auto,
    /// Views: bytes are read when they are touched. For host memory only.
    Lazy,
    /// Past the page cache, in large aligned blocks.
    Direct,
    /// Through the page cache.
    Buffered,
    /// From a map of the file. For host memory only.
    Mmap,
}

impl Strategy {
    /// Every strategy.
    pub const ALL: [Strategy; 5] = [
        Strategy::Auto,
        Strategy::Lazy,
        Strategy::Direct,
        Strategy::Buffered,
        Strategy::Mmap,
    ];

    /// Its name: `auto`, `lazy`, `direct`, `buffered`, `mmap`.
    pub fn name(self) -> &'static str {
        match self {
            Strategy::Auto => "auto",
            Strategy::Lazy => "lazy",
            Strategy::Direct => "direct",
            Strategy::Buffered => "buffered",
            Strategy::Mmap => "mmap",
        }
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A text that names no strategy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownStrategy(String);

impl fmt::Display for UnknownStrategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} names no strategy:", self.0)?;
        Strategy::ALL
            .iter()
            .try_for_each(|known| write!(f, " {known}"))
    }
}

impl std::error::Error for UnknownStrategy {}

impl FromStr for Strategy {
    type Err = UnknownStrategy;

    fn from_str(text: &str) -> Result<Self, UnknownStrategy> {
        let known = Strategy::ALL.into_iter().find(|known| known.name() == text);
        known.ok_or_else(|| UnknownStrategy(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for known in Strategy::ALL {
            assert_eq!(known.to_string().parse(), Ok(known));
        }
        let error = "fast".parse::<Strategy>().unwrap_err();
        assert!(error.to_string().contains("direct"), "{error}");
    }
}
