//! Patterns over tensor names: globs that choose, and rewrites that rename.
//!
//! A glob is what [`names::matches`] takes: `*` is any run of characters (dots too), `?` one character,
//! `[a-c]` one of these and `[!a-c]` none of them. Nothing else is special.

use std::borrow::Cow;

use regex_lite::Regex;
use tonnage::names;

use crate::exit::Failure;

/// Names that are chosen: all, if there is no pattern.
#[derive(Debug)]
pub struct Selection<'a>(&'a [String]);

impl<'a> Selection<'a> {
    /// The names that one of these globs matches.
    pub fn new(globs: &'a [String]) -> Self {
        Selection(globs)
    }

    /// Whether the name is chosen.
    pub fn has(&self, name: &str) -> bool {
        self.0.is_empty() || self.0.iter().any(|glob| names::matches(glob, name))
    }

    /// The failure that nothing was chosen, with names that were perhaps meant.
    pub fn nothing<'n>(&self, all: impl Iterator<Item = &'n str>) -> Failure {
        nothing(self.0.first().map_or("", String::as_str), all)
    }
}

/// The failure that no name matches a pattern, with names that were perhaps meant.
pub fn nothing<'n>(pattern: &str, all: impl Iterator<Item = &'n str>) -> Failure {
    let near = names::near(pattern, all);
    let meant = match near.first() {
        Some(first) => format!("; did you mean {first:?}?"),
        None => String::new(),
    };
    Failure::Absent(format!("no tensor matches {pattern:?}{meant}"))
}

fn regex(pattern: &str) -> Result<Regex, Failure> {
    // `(?s)`: a name may hold a line feed.
    Regex::new(&format!("(?s){pattern}"))
        .map_err(|error| Failure::Usage(format!("the pattern {pattern:?} is not valid: {error}")))
}

/// The glob as a regular expression: each wildcard is a group.
fn as_regex(glob: &str) -> String {
    let mut pattern = String::new();
    let mut rest = glob.chars();
    while let Some(c) = rest.next() {
        match c {
            '*' => pattern.push_str("(.*)"),
            '?' => pattern.push_str("(.)"),
            '[' if rest
                .as_str()
                .get(1..)
                .is_some_and(|tail| tail.contains(']')) =>
            {
                pattern.push_str(&class(&mut rest));
            }
            other => pattern.push_str(&regex_lite::escape(other.encode_utf8(&mut [0; 4]))),
        }
    }
    pattern
}

/// `abc]` or `!abc]` as a class of characters.
fn class(rest: &mut std::str::Chars<'_>) -> String {
    let mut class = String::from("([");
    for (i, c) in rest.by_ref().enumerate() {
        match c {
            '!' if i == 0 => class.push('^'),
            ']' if i > 0 && !class.ends_with('^') => break,
            '-' => class.push('-'),
            other => class.push_str(&format!("\\x{{{:x}}}", other as u32)),
        }
    }
    class.push_str("])");
    class
}

/// How names become others.
#[derive(Debug)]
pub struct Rewrite {
    from: Regex,
    to: String,
    regular: bool,
}

impl Rewrite {
    /// `from` is a name or a glob. Each wildcard of `to` stands for what the wildcard at the same
    /// place of `from` matched.
    ///
    /// # Errors
    /// Wildcards of `to` that `from` does not have.
    pub fn glob(from: &str, to: &str) -> Result<Self, Failure> {
        let pattern = as_regex(from);
        let from = regex(&format!("^{pattern}$"))?;
        let (has, wants) = (from.captures_len() - 1, to.matches('*').count());
        if wants > has {
            let text = format!("the new name {to:?} has {wants} `*`, but the old name has {has}");
            return Err(Failure::Usage(text));
        }
        // `$` is nothing special here; `*` becomes the group of its number.
        let mut template = String::new();
        let mut group = 0;
        for c in to.chars() {
            match c {
                '*' => {
                    group += 1;
                    template.push_str(&format!("${{{group}}}"));
                }
                '$' => template.push_str("$$"),
                other => template.push(other),
            }
        }
        Ok(Rewrite {
            from,
            to: template,
            regular: false,
        })
    }

    /// `from` is a regular expression, found anywhere in a name, and replaced throughout; `to` may
    /// use `$1` or `${name}`.
    ///
    /// # Errors
    /// An expression that is not valid.
    pub fn regex(from: &str, to: &str) -> Result<Self, Failure> {
        Ok(Rewrite {
            from: regex(from)?,
            to: to.to_owned(),
            regular: true,
        })
    }

    /// The new name, if the pattern matches.
    pub fn apply<'a>(&self, name: &'a str) -> Option<Cow<'a, str>> {
        if !self.from.is_match(name) {
            return None;
        }
        Some(if self.regular {
            self.from.replace_all(name, self.to.as_str())
        } else {
            self.from.replace(name, self.to.as_str())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(glob: &str, name: &str) -> bool {
        Selection::new(&[glob.to_owned()]).has(name)
    }

    #[test]
    fn globs_choose() {
        assert!(chosen(
            "model.layers.*.weight",
            "model.layers.0.q_proj.weight"
        ));
        assert!(!chosen(
            "model.layers.*.weight",
            "model.layers.0.q_proj.bias"
        ));
        assert!(chosen("l.?.w", "l.7.w") && !chosen("l.?.w", "l.17.w"));
        assert!(chosen("l.[0-2].w", "l.1.w") && !chosen("l.[0-2].w", "l.3.w"));
        assert!(chosen("l.[!0].w", "l.1.w") && !chosen("l.[!0].w", "l.0.w"));
        assert!(chosen("a+b(c)$", "a+b(c)$") && !chosen("a.c", "abc"));
        assert!(chosen("a[", "a[") && chosen("*", "line\nfeed") && chosen("[]]", "]"));
        assert!(Selection::new(&[]).has("anything"));
        let absent = nothing("lm_haed", ["lm_head", "x"].into_iter());
        assert!(matches!(absent, Failure::Absent(text) if text.contains("mean \"lm_head\"")));
    }

    #[test]
    fn rewrites_carry_what_the_wildcards_matched() {
        let rewrite = |from, to, name| {
            Rewrite::glob(from, to)
                .unwrap()
                .apply(name)
                .map(Cow::into_owned)
        };
        assert_eq!(
            rewrite("a.*.b", "x.*.y", "a.1.2.b").as_deref(),
            Some("x.1.2.y")
        );
        assert_eq!(rewrite("a", "$1", "a").as_deref(), Some("$1"));
        assert_eq!(rewrite("a", "b", "ab"), None);
        assert!(Rewrite::glob("a.*", "*.*").is_err());
        let regex = |from, to, name| {
            Rewrite::regex(from, to)
                .unwrap()
                .apply(name)
                .map(Cow::into_owned)
        };
        assert_eq!(
            regex(r"^model\.(\w+)", "$1", "model.norm.w").as_deref(),
            Some("norm.w")
        );
        assert_eq!(regex("z", "y", "abc"), None);
        assert!(Rewrite::regex("(", "x").is_err());
    }
}
