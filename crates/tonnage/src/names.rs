//! Names that people type: patterns that select tensors, and what they may have meant.

pub use tonnage_plan::matches;

/// Whether a pattern is more than a plain name.
pub fn is_pattern(text: &str) -> bool {
    text.contains(['*', '?', '['])
}

/// The names nearest to `wanted`, at most three, the nearest first.
pub fn near<'a>(wanted: &str, names: impl Iterator<Item = &'a str>) -> Vec<String> {
    /// Names looked at, and their length: a hostile file has millions, and long ones.
    const LOOK_AT: usize = 20_000;
    const LONGEST: usize = 256;
    if wanted.len() > LONGEST {
        return Vec::new();
    }
    let reach = (wanted.chars().count() / 3).clamp(1, 8);
    let mut found: Vec<(usize, &str)> = names
        .take(LOOK_AT)
        .filter(|name| name.len() <= LONGEST)
        .filter_map(|name| {
            let tail = !wanted.is_empty()
                && (name.ends_with(wanted) || wanted.ends_with(name))
                && !name.is_empty();
            let distance = if tail {
                Some(1)
            } else {
                distance(wanted, name, reach)
            };
            distance.map(|distance| (distance, name))
        })
        .collect();
    found.sort_unstable();
    found
        .into_iter()
        .take(3)
        .map(|(_, name)| name.to_owned())
        .collect()
}

/// Insertions, deletions and substitutions from `a` to `b`, if at most `reach`.
fn distance(a: &str, b: &str, reach: usize) -> Option<usize> {
    if a.len().abs_diff(b.len()) > reach * 4 {
        return None;
    }
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        let mut best = row[0];
        for (j, &y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(row[j + 1] + 1);
            best = best.min(row[j + 1]);
        }
        if best > reach {
            return None;
        }
    }
    row.last().copied().filter(|&distance| distance <= reach)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_like_a_shell_but_a_star_takes_dots() {
        for (pattern, name) in [
            ("a", "a"),
            ("*", ""),
            ("*", "a.b"),
            ("model.layers.0.*", "model.layers.0.mlp.up"),
            ("*.w?", "x.y.wq"),
            ("l[0-3].w", "l2.w"),
            ("l[!0-3].w", "l7.w"),
            ("a[", "a["),
            ("[]]", "]"),
            ("a*b*c", "aXbYbZc"),
            ("[ab-]", "-"),
        ] {
            assert!(matches(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [
            ("a", "b"),
            ("a", "ab"),
            ("", "a"),
            ("model.layers.0.*", "model.layers.01"),
            ("l[0-3]", "l4"),
            ("l[!a]", "la"),
            ("a?", "a"),
            ("a*b*c", "aXbYbZ"),
        ] {
            assert!(!matches(pattern, name), "{pattern} {name}");
        }
        // Quadratic at worst: the last star alone is tried again.
        assert!(!matches(&"*a".repeat(40), &"b".repeat(10_000)));
        assert!(is_pattern("a*") && !is_pattern("a.b"));
    }

    #[test]
    fn near_names_are_near() {
        let names = [
            "model.norm.weight",
            "lm_head.weight",
            "model.embed.weight",
            "x",
        ];
        let near = |wanted: &str| near(wanted, names.into_iter());
        assert_eq!(near("lm_head.wieght"), ["lm_head.weight"]);
        assert_eq!(near("norm.weight"), ["model.norm.weight"]);
        assert!(near("nothing like it at all").is_empty());
        assert!(near("").is_empty() || near("") == ["x"]);
        assert!(near(&"x".repeat(5000)).is_empty());
    }
}
