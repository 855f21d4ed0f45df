//! Regular expressions of configuration files, as far as such files use them, in linear time.
//!
//! `.`, `\d`, `\w`, `\.` and other escapes, `[a-z]`, `( | )`, `*`, `+`, `?`, `^` and `$`. A set of positions walks over the name
//! once, so that no expression takes more than its length times the name's. What else an expression has makes it unknown,
//! and the caller looks for the answer elsewhere.

/// Most characters of an expression.
const MAX_LEN: usize = 1024;
/// Most groups within each other.
const MAX_DEPTH: usize = 32;

#[derive(Clone, Debug)]
enum Step {
    /// One character, by what it may be.
    Take(Class),
    /// Goes on at either of two places.
    Split(usize, usize),
    /// Goes on there.
    Jump(usize),
    Start,
    End,
    Match,
}

#[derive(Clone, Debug)]
enum Class {
    Any,
    Digit,
    Word,
    One(char),
    Set(Vec<(char, char)>, bool),
}

impl Class {
    fn has(&self, c: char) -> bool {
        match self {
            Class::Any => c != '\n',
            Class::Digit => c.is_ascii_digit(),
            Class::Word => c.is_alphanumeric() || c == '_',
            Class::One(one) => *one == c,
            Class::Set(ranges, not) => {
                ranges.iter().any(|&(from, to)| (from..=to).contains(&c)) != *not
            }
        }
    }
}

/// An expression that was understood.
#[derive(Clone, Debug)]
pub(crate) struct Pattern(Vec<Step>);

impl Pattern {
    /// Reads an expression; `None` where it has something that is not known here.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        if text.len() > MAX_LEN {
            return None;
        }
        let mut parser = Parser {
            text: text.chars().collect(),
            at: 0,
        };
        let mut steps = parser.alternatives(0)?;
        if parser.at != parser.text.len() {
            return None;
        }
        steps.push(Step::Match);
        Some(Pattern(steps))
    }

    /// Whether it matches somewhere in the name, as `re.search`; or from its first character on, as `re.match`.
    pub(crate) fn matches(&self, name: &str, anchored: bool) -> bool {
        let characters: Vec<char> = name.chars().collect();
        let (mut now, mut next) = (Set::new(self.0.len()), Set::new(self.0.len()));
        for at in 0..=characters.len() {
            if at == 0 || !anchored {
                self.add(&mut now, 0, at, characters.len());
            }
            next.clear();
            for index in 0..now.list.len() {
                match (
                    now.list
                        .get(index)
                        .and_then(|&step| self.0.get(step).map(|s| (step, s))),
                    characters.get(at),
                ) {
                    (Some((_, Step::Match)), _) => return true,
                    (Some((step, Step::Take(class))), Some(&c)) if class.has(c) => {
                        self.add(&mut next, step + 1, at + 1, characters.len());
                    }
                    _ => {}
                }
            }
            std::mem::swap(&mut now, &mut next);
        }
        false
    }

    /// Adds a place and all that it leads to without a character.
    fn add(&self, set: &mut Set, step: usize, at: usize, end: usize) {
        let mut todo = vec![step];
        while let Some(step) = todo.pop() {
            if !set.insert(step) {
                continue;
            }
            match self.0.get(step) {
                Some(Step::Split(one, other)) => todo.extend([*one, *other]),
                Some(Step::Jump(to)) => todo.push(*to),
                Some(Step::Start) if at == 0 => todo.push(step + 1),
                Some(Step::End) if at == end => todo.push(step + 1),
                _ => {}
            }
        }
    }
}

struct Set {
    list: Vec<usize>,
    there: Vec<bool>,
}

impl Set {
    fn new(len: usize) -> Self {
        Set {
            list: Vec::new(),
            there: vec![false; len],
        }
    }

    fn clear(&mut self) {
        self.list.clear();
        self.there.fill(false);
    }

    fn insert(&mut self, step: usize) -> bool {
        match self.there.get_mut(step) {
            Some(there) if !*there => {
                *there = true;
                self.list.push(step);
                true
            }
            _ => false,
        }
    }
}

struct Parser {
    text: Vec<char>,
    at: usize,
}

impl Parser {
    fn peek(&self) -> Option<char> {
        self.text.get(self.at).copied()
    }

    fn eat(&mut self, c: char) -> bool {
        let there = self.peek() == Some(c);
        self.at += usize::from(there);
        there
    }

    fn alternatives(&mut self, depth: usize) -> Option<Vec<Step>> {
        if depth > MAX_DEPTH {
            return None;
        }
        let mut steps = self.sequence(depth)?;
        while self.eat('|') {
            let other = self.sequence(depth)?;
            // split one, other; one; jump end; other
            let (one, len) = (steps.len(), other.len());
            let mut both = vec![Step::Split(1, one + 2)];
            both.extend(shifted(steps, 1));
            both.push(Step::Jump(one + 2 + len));
            both.extend(shifted(other, one + 2));
            steps = both;
        }
        Some(steps)
    }

    fn sequence(&mut self, depth: usize) -> Option<Vec<Step>> {
        let mut steps = Vec::new();
        while let Some(c) = self.peek() {
            if c == '|' || c == ')' {
                break;
            }
            let atom = self.atom(depth)?;
            let atom = self.repeated(atom)?;
            steps.extend(shifted(atom, steps.len()));
        }
        Some(steps)
    }

    fn repeated(&mut self, atom: Vec<Step>) -> Option<Vec<Step>> {
        let len = atom.len();
        let mut steps = Vec::new();
        match self.peek() {
            Some('*') => {
                steps.push(Step::Split(1, len + 2));
                steps.extend(shifted(atom, 1));
                steps.push(Step::Jump(0));
            }
            Some('+') => {
                steps.extend(atom);
                steps.push(Step::Split(0, len + 1));
            }
            Some('?') => {
                steps.push(Step::Split(1, len + 1));
                steps.extend(shifted(atom, 1));
            }
            Some('{') => return None,
            _ => return Some(atom),
        }
        self.at += 1;
        // A lazy quantifier matches the same names.
        self.eat('?');
        match self.peek() {
            Some('*' | '+' | '?') => None,
            _ => Some(steps),
        }
    }

    fn atom(&mut self, depth: usize) -> Option<Vec<Step>> {
        let c = self.peek()?;
        self.at += 1;
        let class = match c {
            '.' => Class::Any,
            '^' => return Some(vec![Step::Start]),
            '$' => return Some(vec![Step::End]),
            '\\' => self.escape()?,
            '[' => self.set()?,
            '(' => {
                if self.eat('?') && !self.eat(':') {
                    return None;
                }
                let inner = self.alternatives(depth + 1)?;
                return self.eat(')').then_some(inner);
            }
            '*' | '+' | '?' | '{' => return None,
            c => Class::One(c),
        };
        Some(vec![Step::Take(class)])
    }

    fn escape(&mut self) -> Option<Class> {
        let c = self.peek()?;
        self.at += 1;
        match c {
            'd' => Some(Class::Digit),
            'w' => Some(Class::Word),
            c if c.is_alphanumeric() => None,
            c => Some(Class::One(c)),
        }
    }

    fn set(&mut self) -> Option<Class> {
        let not = self.eat('^');
        let mut ranges = Vec::new();
        loop {
            let from = self.peek()?;
            self.at += 1;
            if from == ']' {
                return (!ranges.is_empty()).then_some(Class::Set(ranges, not));
            }
            if from == '\\' {
                match self.escape()? {
                    Class::One(c) => ranges.push((c, c)),
                    Class::Digit => ranges.push(('0', '9')),
                    _ => return None,
                }
                continue;
            }
            if self.peek() == Some('-') && self.text.get(self.at + 1) != Some(&']') {
                self.at += 1;
                let to = self.peek()?;
                self.at += 1;
                ranges.push((from, to));
            } else {
                ranges.push((from, from));
            }
        }
    }
}

/// Steps that lie further on.
fn shifted(steps: Vec<Step>, by: usize) -> impl Iterator<Item = Step> {
    steps.into_iter().map(move |step| match step {
        Step::Split(one, other) => Step::Split(one + by, other + by),
        Step::Jump(to) => Step::Jump(to + by),
        other => other,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_configuration_files_use() {
        let found =
            |pattern: &str, name: &str| Pattern::parse(pattern).unwrap().matches(name, false);
        assert!(found("mlp\\.down_proj", "model.layers.0.mlp.down_proj"));
        assert!(!found("mlp\\.down_proj", "model.layers.0.mlpxdown_proj"));
        assert!(found(".*lm_head.*", "lm_head"));
        assert!(found(
            "^model.layers.(0|1[0-9]).mlp$",
            "model.layers.17.mlp"
        ));
        assert!(!found(
            "^model.layers.(0|1[0-9]).mlp$",
            "model.layers.27.mlp"
        ));
        assert!(found(
            "layers\\.\\d+\\.(?:gate|up)_proj",
            "layers.12.up_proj"
        ));
        assert!(found("a[^.]*b?c+", "xaqqbcc"));
        assert!(found("", "anything") && found("a|", "b"));
        let start = Pattern::parse("model.*proj").unwrap();
        assert!(start.matches("model.x.q_proj", true) && !start.matches("the.model.q_proj", true));
        for unknown in ["(?<name>a)", "a{2}", "\\bword", "a**", "(", "[", ")", "*"] {
            assert!(Pattern::parse(unknown).is_none(), "{unknown}");
        }
        assert!(Pattern::parse(&"(".repeat(200)).is_none());
    }

    #[test]
    fn time_is_the_product_of_the_lengths() {
        // Exponential for a matcher that goes back.
        let pattern = Pattern::parse(&format!("{}{}$", "(a|aa)+".repeat(60), "b")).unwrap();
        assert!(!pattern.matches(&"a".repeat(4000), false));
    }
}
