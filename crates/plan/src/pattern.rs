//! Patterns over tensor names: `*` is any run of characters, dots too, `?` one character, `[abc]` and `[a-c]`
//! one of these and `[!a-c]` none of them; everything else is itself, a bracket that nothing closes too.

/// Whether a pattern matches a whole name.
pub fn matches(pattern: &str, name: &str) -> bool {
    // Most patterns begin or end with plain text: compare that first.
    let special = |byte: &u8| matches!(byte, b'*' | b'?' | b'[');
    let (mut rest, mut text) = (pattern.as_bytes(), name.as_bytes());
    let head = rest.iter().position(special);
    let Some(head) = head else {
        return pattern == name;
    };
    if rest.get(..head) != text.get(..head) {
        return false;
    }
    (rest, text) = (rest.split_at(head).1, text.split_at(head).1);
    if let Some(star) = rest.iter().rposition(|&byte| byte == b'*') {
        let tail = rest.split_at(star + 1).1;
        if !tail.iter().any(|byte| matches!(byte, b'?' | b'[' | b']')) {
            if !text.ends_with(tail) {
                return false;
            }
            if star == 0 {
                return true;
            }
        }
    }
    slow(
        pattern.get(head..).unwrap_or(""),
        name.get(head..).unwrap_or(""),
    )
}

/// Character by character, with the last star to come back to.
fn slow(pattern: &str, name: &str) -> bool {
    let (mut rest, mut text) = (pattern, name);
    let mut back: Option<(&str, &str)> = None;
    loop {
        if let Some(after) = rest.strip_prefix('*') {
            rest = after;
            back = Some((after, text));
            continue;
        }
        if let Some(c) = text.chars().next() {
            if let Some(after) = one(rest, c) {
                rest = after;
                text = text.split_at(c.len_utf8()).1;
                continue;
            }
        } else if rest.is_empty() {
            return true;
        }
        // The last star takes one character more.
        let Some((after, from)) = back else {
            return false;
        };
        let mut chars = from.chars();
        if chars.next().is_none() {
            return false;
        }
        (rest, text) = (after, chars.as_str());
        back = Some((after, text));
    }
}

/// The pattern after its first element, where that matches `c`.
fn one(pattern: &str, c: char) -> Option<&str> {
    let mut chars = pattern.chars();
    match chars.next()? {
        '?' => Some(chars.as_str()),
        '[' => match set(chars.as_str(), c) {
            Some((true, after)) => Some(after),
            Some((false, _)) => None,
            // A bracket that nothing closes is a character.
            None => (c == '[').then_some(chars.as_str()),
        },
        other => (other == c).then_some(chars.as_str()),
    }
}

/// Whether a set, given from behind its bracket, has `c`; and what follows it. The first character
/// may be a closing bracket.
fn set(text: &str, c: char) -> Option<(bool, &str)> {
    let (none, body) = match text.strip_prefix('!') {
        Some(body) => (true, body),
        None => (false, text),
    };
    let first = body.chars().next()?.len_utf8();
    let end = first + body.get(first..)?.find(']')?;
    let (members, after) = (body.get(..end)?, body.get(end + 1..)?);
    Some((has(members, c) != none, after))
}

/// Whether the inside of a set has `c`: characters, and ranges of them.
fn has(mut members: &str, c: char) -> bool {
    loop {
        let mut chars = members.chars();
        let Some(first) = chars.next() else {
            return false;
        };
        let rest = chars.as_str();
        let mut range = rest.chars();
        let last = (range.next() == Some('-')).then(|| range.next()).flatten();
        if (first..=last.unwrap_or(first)).contains(&c) {
            return true;
        }
        members = if last.is_some() { range.as_str() } else { rest };
    }
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn stars_take_dots_and_sets_take_one_character() {
        for (pattern, name) in [
            ("*", ""),
            ("*", "a.b"),
            ("a.*.c", "a.b.b.c"),
            ("*.q_proj.weight", "model.layers.0.q_proj.weight"),
            ("*.layers.[01].*", "model.layers.1.mlp"),
            ("*.layers.[!01].*", "model.layers.2.mlp"),
            ("a?c", "aéc"),
            ("[", "["),
            ("a*a*a", "aaaa"),
            ("plain", "plain"),
            ("*]", "x]"),
            ("[]]x", "]x"),
            ("layers.[0-3].*", "layers.2.mlp"),
            ("[a-]", "-"),
            ("[-a]", "-"),
            ("[0-9a-f]", "e"),
            ("[!a-c]", "d"),
            ("[α-ω]", "λ"),
        ] {
            assert!(matches(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [
            ("a", "ab"),
            ("*.q", "q"),
            ("a?c", "ac"),
            ("[ab]", "c"),
            ("[!ab]", "a"),
            ("a*a*a", "aa"),
            ("", "a"),
            ("é*", "e"),
            ("aé?", "aé"),
            ("layers.[0-3].*", "layers.4.mlp"),
            ("layers.[0-3].*", "layers.-.mlp"),
            ("[!a-c]", "b"),
            ("[c-a]", "b"),
        ] {
            assert!(!matches(pattern, name), "{pattern} {name}");
        }
    }
}
