//! Patterns of names: `{}` stands for one or more characters other than a dot; everything else for itself.
//!
//! A budget counts steps, so that no map, however it is made, takes more time than it.

use std::collections::{BTreeMap, HashMap};

use crate::error::{Error, Reason};

/// Steps that one map may take: some seconds.
const BUDGET: u64 = 1 << 30;

/// What is left to spend.
pub(super) struct Budget(u64);

impl Budget {
    pub(super) fn new() -> Self {
        Budget(BUDGET)
    }

    /// Takes some of it.
    pub(super) fn spend(&mut self, steps: u64) -> Result<(), Error> {
        self.0 = self.0.checked_sub(steps).ok_or_else(|| {
            Error::new(
                Reason::Parameter,
                format!("matching names takes more than {BUDGET} steps"),
            )
        })?;
        Ok(())
    }
}

/// Patterns by which of them is the first that matches a name.
#[derive(Default)]
pub(super) struct Globs {
    exact: HashMap<String, usize>,
    /// By the number of segments.
    open: BTreeMap<usize, Vec<(usize, Vec<String>)>>,
    len: usize,
}

impl Globs {
    /// Adds the next pattern.
    pub(super) fn push(&mut self, pattern: &str) {
        if pattern.contains("{}") {
            let segments: Vec<String> = pattern.split('.').map(str::to_owned).collect();
            let same = self.open.entry(segments.len()).or_default();
            same.push((self.len, segments));
        } else {
            self.exact.entry(pattern.to_owned()).or_insert(self.len);
        }
        self.len += 1;
    }

    /// The first pattern that matches.
    pub(super) fn first(&self, name: &str, budget: &mut Budget) -> Result<Option<usize>, Error> {
        let exact = self.exact.get(name).copied();
        let segments: Vec<&str> = name.split('.').collect();
        budget.spend(1 + name.len() as u64)?;
        for (at, pattern) in self.open.get(&segments.len()).into_iter().flatten() {
            if exact.is_some_and(|exact| exact < *at) {
                break;
            }
            let mut all = true;
            for (pattern, segment) in pattern.iter().zip(&segments) {
                if !one(pattern.as_bytes(), segment.as_bytes(), budget)? {
                    all = false;
                    break;
                }
            }
            if all {
                return Ok(Some(*at));
            }
        }
        Ok(exact)
    }
}

/// Whether one segment matches: the last `{}` takes one more character wherever what follows it does not fit.
fn one(pattern: &[u8], name: &[u8], budget: &mut Budget) -> Result<bool, Error> {
    let (mut p, mut n) = (0, 0);
    let mut open: Option<(usize, usize)> = None;
    loop {
        budget.spend(1)?;
        if pattern.get(p..p + 2) == Some(b"{}") {
            // At least one character.
            if n >= name.len() {
                return Ok(false);
            }
            (p, n) = (p + 2, n + 1);
            open = Some((p, n));
            continue;
        }
        match (pattern.get(p), name.get(n)) {
            (None, None) => return Ok(true),
            (Some(a), Some(b)) if a == b => (p, n) = (p + 1, n + 1),
            (_, Some(_)) => match &mut open {
                Some((after, taken)) => {
                    *taken += 1;
                    (p, n) = (*after, *taken);
                    if n > name.len() {
                        return Ok(false);
                    }
                }
                None => return Ok(false),
            },
            (Some(_), None) => return Ok(false),
        }
    }
}

/// A name with each number between dots left open.
pub(super) fn template(name: &str) -> String {
    let segment = |segment: &str| {
        let number = !segment.is_empty() && segment.bytes().all(|b| b.is_ascii_digit());
        if number {
            "{}".to_owned()
        } else {
            segment.to_owned()
        }
    };
    name.split('.').map(segment).collect::<Vec<_>>().join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, name: &str) -> bool {
        let mut globs = Globs::default();
        globs.push(pattern);
        globs.first(name, &mut Budget::new()).unwrap().is_some()
    }

    #[test]
    fn braces_take_one_segment_or_part_of_it() {
        assert!(matches("a.{}.b", "a.12.b") && matches("a.{}_proj", "a.q_proj"));
        assert!(matches("{}x{}", "axbxc") && matches("{}{}", "ab") && !matches("{}{}", "a"));
        assert!(!matches("a.{}.b", "a.1.2.b") && !matches("a.{}", "a.") && !matches("a{}", "a"));
        assert!(matches("a{b}", "a{b}") && !matches("a{b}", "ab"));
        assert!(matches("", "") && !matches("", "a"));
        assert!(matches("{}é", "éé") && matches("x{}", "x{}"));
    }

    #[test]
    fn the_first_that_matches_wins() {
        let mut globs = Globs::default();
        for pattern in ["a.1", "a.{}", "a.2", "{}.{}"] {
            globs.push(pattern);
        }
        let first = |name| globs.first(name, &mut Budget::new()).unwrap();
        assert_eq!(
            [first("a.1"), first("a.2"), first("b.2"), first("b")],
            [Some(0), Some(1), Some(3), None]
        );
    }

    #[test]
    fn steps_are_counted() {
        let mut globs = Globs::default();
        for _ in 0..1000 {
            globs.push(&format!("{}b", "{}a".repeat(500)));
        }
        let name = "a".repeat(20_000);
        let mut budget = Budget::new();
        let error = (0..1000).find_map(|_| globs.first(&name, &mut budget).err());
        assert!(error.unwrap().to_string().contains("steps"));
    }
}
