//! Models that are split into several files: `name-00001-of-00003.gguf` and so on.

use super::error::{Error, Reason};
use super::header::Gguf;

/// Keys by which the files of a split model know their place.
pub(crate) const KEYS: [&str; 3] = ["split.no", "split.count", "split.tensors.count"];

/// What a file says of its place among others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Split {
    /// Its number, from 0 on.
    pub no: u64,
    /// How many files there are.
    pub count: u64,
    /// Tensors of all files together; `None` where the file does not say.
    pub tensors: Option<u64>,
}

impl Gguf {
    /// What the file says of its place among others. A file that is alone says nothing, or that it is one of one.
    pub fn split(&self) -> Option<Split> {
        let number = |key: &str| self.value(key).and_then(|value| value.as_u64());
        let [no, count, tensors] = KEYS;
        let count = number(count).filter(|&count| count > 0)?;
        Some(Split {
            no: number(no).unwrap_or(0),
            count,
            tensors: number(tensors),
        })
    }
}

/// Stem, number (from 1 on) and count of a file's name such as `model-00001-of-00003.gguf`.
pub fn split_name(name: &str) -> Option<(&str, u64, u64)> {
    let rest = name.strip_suffix(".gguf")?;
    let (rest, count) = rest.rsplit_once("-of-")?;
    let (stem, no) = rest.rsplit_once('-')?;
    let number = |digits: &str| {
        let plain = digits.len() == 5 && digits.bytes().all(|byte| byte.is_ascii_digit());
        plain.then(|| digits.parse::<u64>().ok()).flatten()
    };
    let (no, count) = (number(no)?, number(count)?);
    (1..=count).contains(&no).then_some((stem, no, count))
}

/// Checks that files, in this order, are all of one split model.
///
/// # Errors
/// [`Reason::Split`], with what is the matter.
pub fn check_split(files: &[&Gguf]) -> Result<(), Error> {
    let refuse =
        |found: String, needed: String| Err(Error::new(Reason::Split).found(found).needed(needed));
    let mut total: u64 = 0;
    for (at, file) in files.iter().enumerate() {
        let of = files.len() as u64;
        match file.split() {
            Some(split) if split.count != of => {
                return refuse(format!("{of} files"), format!("{} of them", split.count));
            }
            Some(split) if split.no != at as u64 => {
                return refuse(
                    format!("number {} in place {at}", split.no),
                    format!("number {at}"),
                );
            }
            None if of > 1 => {
                return refuse(
                    format!("file {} without split.count", at + 1),
                    format!("{of}"),
                );
            }
            _ => {}
        }
        total = total.saturating_add(file.len() as u64);
    }
    let said = files.first().and_then(|file| file.split()?.tensors);
    match said {
        Some(said) if said != total => refuse(
            format!("{total} tensors in all"),
            format!("{said}, as split.tensors.count says"),
        ),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_split_files() {
        assert_eq!(split_name("m-00001-of-00003.gguf"), Some(("m", 1, 3)));
        assert_eq!(split_name("a-b-00003-of-00003.gguf"), Some(("a-b", 3, 3)));
        for other in [
            "m.gguf",
            "m-00000-of-00003.gguf",
            "m-00004-of-00003.gguf",
            "m-1-of-3.gguf",
            "m-00001-of-00003.safetensors",
            "m-+0001-of-00003.gguf",
        ] {
            assert_eq!(split_name(other), None, "{other}");
        }
    }
}
