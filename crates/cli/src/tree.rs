//! Tensors grouped by module: `encoder.layer.0.attention.query.weight` is a path of six steps.
//!
//! A step that has only one child is joined with it, and numbered children that are built alike are
//! shown once, as `layer.[0-5]`.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

/// A tensor as the tree sees it.
#[derive(Clone, Copy, Debug)]
pub struct Leaf<'a> {
    /// Its whole name.
    pub name: &'a str,
    /// What the dtype is called.
    pub dtype: &'a str,
    /// Its extents.
    pub shape: &'a [u64],
    /// Its elements.
    pub elements: u64,
    /// Its bytes.
    pub bytes: u64,
}

/// A module, or a tensor.
#[derive(Debug)]
pub struct Node<'a> {
    /// The steps from the parent to here, joined by dots.
    pub label: String,
    /// The tensor whose name ends here.
    pub leaf: Option<Leaf<'a>>,
    /// What lies below, in natural order.
    pub children: Vec<Node<'a>>,
    /// How many alike this stands for; what is below, and the totals, are those of one.
    pub times: u64,
    /// Elements of all tensors here and below, in one.
    pub elements: u64,
    /// Bytes of them.
    pub bytes: u64,
    alike: u64,
}

/// Steps that are taken apart; what is deeper stays one label. Real models have about ten; a
/// hostile name of a megabyte of dots must not exhaust the stack.
const DEEPEST: usize = 32;

/// The tree of these tensors. `collapse` shows numbered modules that are built alike once.
pub fn tree<'a>(leaves: impl Iterator<Item = Leaf<'a>>, collapse: bool) -> Vec<Node<'a>> {
    let mut paths: Vec<(Vec<&'a str>, Leaf<'a>)> = leaves
        .map(|leaf| (leaf.name.splitn(DEEPEST, '.').collect(), leaf))
        .collect();
    paths.sort_by(|(a, _), (b, _)| natural(a, b));
    level(&paths, 0, collapse)
}

/// Order of paths: step by step, numbers by value.
fn natural(a: &[&str], b: &[&str]) -> Ordering {
    for (a, b) in a.iter().zip(b) {
        let step = match (number(a), number(b)) {
            (Some(x), Some(y)) => x.cmp(&y).then_with(|| a.cmp(b)),
            // Numbered modules (the bulk of a model) come after what is named.
            (Some(_), None) => Ordering::Greater,
            (None, Some(_)) => Ordering::Less,
            (None, None) => a.cmp(b),
        };
        if step != Ordering::Equal {
            return step;
        }
    }
    a.len().cmp(&b.len())
}

fn number(step: &str) -> Option<u64> {
    let digits = !step.is_empty() && step.bytes().all(|byte| byte.is_ascii_digit());
    let plain = digits && (step == "0" || !step.starts_with('0'));
    if plain { step.parse().ok() } else { None }
}

fn level<'a>(paths: &[(Vec<&'a str>, Leaf<'a>)], depth: usize, collapse: bool) -> Vec<Node<'a>> {
    let step = |path: &(Vec<&'a str>, Leaf<'a>)| path.0.get(depth).copied();
    let mut nodes: Vec<(Option<u64>, Node<'a>)> = Vec::new();
    for group in paths.chunk_by(|a, b| step(a) == step(b)) {
        let Some(label) = group.first().and_then(step) else {
            continue;
        };
        let ends = group
            .iter()
            .take_while(|(path, _)| path.len() == depth + 1)
            .count();
        let (here, below) = group.split_at(ends);
        let children = level(below, depth + 1, collapse);
        nodes.push((
            number(label),
            Node::new(label, here.first().map(|(_, leaf)| *leaf), children),
        ));
    }
    let nodes = if collapse {
        collapsed(nodes)
    } else {
        nodes.into_iter().map(|(_, n)| n).collect()
    };
    nodes.into_iter().map(joined).collect()
}

impl<'a> Node<'a> {
    fn new(label: &str, leaf: Option<Leaf<'a>>, children: Vec<Node<'a>>) -> Self {
        let sum = |of: fn(&Node<'_>) -> u64, own: Option<u64>| {
            children
                .iter()
                .map(|child| of(child).saturating_mul(child.times))
                .fold(own.unwrap_or(0), u64::saturating_add)
        };
        let elements = sum(|child| child.elements, leaf.map(|leaf| leaf.elements));
        let bytes = sum(|child| child.bytes, leaf.map(|leaf| leaf.bytes));
        let mut alike = DefaultHasher::new();
        leaf.map(|leaf| (leaf.dtype, leaf.shape)).hash(&mut alike);
        for child in &children {
            (&child.label, child.times, child.alike).hash(&mut alike);
        }
        let alike = alike.finish();
        let label = label.to_owned();
        Node {
            label,
            leaf,
            children,
            times: 1,
            elements,
            bytes,
            alike,
        }
    }

    fn is_like(&self, other: &Node<'_>) -> bool {
        let leaf = |node: &Node<'a>| node.leaf.map(|leaf| (leaf.dtype, leaf.shape));
        let other_leaf = other.leaf.map(|leaf| (leaf.dtype, leaf.shape));
        self.alike == other.alike
            && leaf(self) == other_leaf
            && self.children.len() == other.children.len()
            && self
                .children
                .iter()
                .zip(&other.children)
                .all(|(a, b)| a.label == b.label && a.times == b.times && a.is_like(b))
    }
}

/// Joins a module with its only child, unless both stand for several.
fn joined(mut node: Node<'_>) -> Node<'_> {
    let single = node.leaf.is_none() && node.children.len() == 1;
    let times = node
        .times
        .min(node.children.first().map_or(1, |child| child.times));
    match node.children.pop() {
        Some(mut child) if single && times == 1 => {
            child.label = format!("{}.{}", node.label, child.label);
            child.times = child.times.max(node.times);
            child
        }
        last => {
            node.children.extend(last);
            node
        }
    }
}

/// Shows numbered children that are alike once.
fn collapsed<'a>(nodes: Vec<(Option<u64>, Node<'a>)>) -> Vec<Node<'a>> {
    let mut kept: Vec<(Vec<u64>, Node<'a>)> = Vec::new();
    let mut known: HashMap<u64, usize> = HashMap::new();
    for (number, node) in nodes {
        let Some(number) = number else {
            kept.push((Vec::new(), node));
            continue;
        };
        match known.get(&node.alike).and_then(|&at| kept.get_mut(at)) {
            Some((numbers, first)) if first.is_like(&node) => numbers.push(number),
            _ => {
                known.insert(node.alike, kept.len());
                kept.push((vec![number], node));
            }
        }
    }
    kept.into_iter()
        .map(|(numbers, mut node)| {
            if numbers.len() > 1 {
                node.label = ranges(&numbers);
                node.times = numbers.len() as u64;
            }
            node
        })
        .collect()
}

/// `[0-5]`, `[0,2-4]`; a long list is cut.
fn ranges(numbers: &[u64]) -> String {
    const MOST: usize = 6;
    let runs: Vec<String> = numbers
        .chunk_by(|a, b| a.checked_add(1) == Some(*b))
        .map(|run| match run {
            [only] => only.to_string(),
            [first, .., last] => format!("{first}-{last}"),
            [] => String::new(),
        })
        .collect();
    let cut = if runs.len() > MOST { ",…" } else { "" };
    format!("[{}{cut}]", runs.get(..MOST).unwrap_or(&runs).join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf<'a>(name: &'a str, shape: &'a [u64]) -> Leaf<'a> {
        let elements = shape.iter().product();
        Leaf {
            name,
            dtype: "F32",
            shape,
            elements,
            bytes: elements * 4,
        }
    }

    fn outline(nodes: &[Node<'_>], depth: usize, out: &mut String) {
        for node in nodes {
            let times = if node.times > 1 {
                format!(" ×{}", node.times)
            } else {
                String::new()
            };
            out.push_str(&format!(
                "{}{}{times} {}\n",
                " ".repeat(depth),
                node.label,
                node.elements
            ));
            outline(&node.children, depth + 1, out);
        }
    }

    fn show(leaves: Vec<Leaf<'_>>, collapse: bool) -> String {
        let mut out = String::new();
        outline(&tree(leaves.into_iter(), collapse), 0, &mut out);
        out
    }

    #[test]
    fn layers_that_are_alike_are_shown_once() {
        let names: Vec<String> = (0..12)
            .flat_map(|i| [format!("m.layers.{i}.a.w"), format!("m.layers.{i}.b")])
            .collect();
        let leaves = || {
            let mut all: Vec<Leaf<'_>> = names.iter().map(|name| leaf(name, &[2])).collect();
            all.push(leaf("m.norm", &[3]));
            all
        };
        assert_eq!(
            show(leaves(), true),
            "m 51\n layers.[0-11] ×12 4\n  a.w 2\n  b 2\n norm 3\n"
        );
        let all = show(leaves(), false);
        assert!(
            all.contains("  2 4\n") && all.lines().count() == 2 + 12 * 3 + 1,
            "{all}"
        );
        let (two, ten) = (all.find("  2 4").unwrap(), all.find("  10 4").unwrap());
        assert!(two < ten, "numbers in order of value");
    }

    #[test]
    fn layers_that_differ_stay_apart_and_sums_hold() {
        let text = show(
            vec![
                leaf("l.0.w", &[2]),
                leaf("l.1.w", &[3]),
                leaf("l.2.w", &[2]),
                leaf("l.3.w", &[2]),
                leaf("l.x", &[1]),
                leaf("l", &[5]),
            ],
            true,
        );
        assert_eq!(text, "l 15\n x 1\n [0,2-3].w ×3 2\n 1.w 3\n");
    }

    #[test]
    fn nested_repeats_multiply() {
        let names: Vec<String> = (0..3)
            .flat_map(|i| (0..4).map(move |e| format!("l.{i}.experts.{e}.w")))
            .collect();
        let text = show(names.iter().map(|name| leaf(name, &[2])).collect(), true);
        assert_eq!(text, "l.[0-2] ×3 8\n experts.[0-3].w ×4 2\n");
    }

    #[test]
    fn hostile_names_are_survived() {
        let dots = ".".repeat(1 << 20);
        let nodes = tree(
            [leaf(&dots, &[1]), leaf("", &[1]), leaf("01.x", &[1])].into_iter(),
            true,
        );
        assert_eq!(nodes.iter().map(|node| node.elements).sum::<u64>(), 3);
        assert_eq!(ranges(&[0, 2, 4, 6, 8, 10, 12]), "[0,2,4,6,8,10,…]");
    }
}
