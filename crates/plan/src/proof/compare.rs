//! Semantics: elements of local tensors beside those that the reference says.

use super::reference::{Node, Way, unravel};
use crate::error::{Error, Reason, Result};
use crate::plan::{Fill, Layout, Loop, Nest};
use crate::table::Source;

/// A local tensor beside the reference.
pub(super) struct Compare<'a, 'p> {
    pub sources: &'a [Source],
    pub layout: &'a Layout,
    pub node: &'a Node,
    pub way: Option<&'a Way<'p>>,
    pub bits: u64,
}

impl Compare<'_, '_> {
    /// Compares one element of a copy or of zeros.
    fn one(&self, dst: u64, src: Option<(u32, u64)>) -> Result<()> {
        let wrong = |found: String, needed: String| {
            Err(Error::new(Reason::Semantics)
                .range(format_args!(
                    "bit {dst} of a local tensor of shape {:?}",
                    self.layout.shape
                ))
                .found(found)
                .needed(needed))
        };
        let Some(way) = self.way.filter(|way| way.shape == self.layout.shape) else {
            return wrong("a tensor".to_owned(), "none, or another shape".to_owned());
        };
        let local = unravel(dst / self.bits, &self.layout.shape);
        let wanted = way.global(&local).and_then(|global| self.node.at(&global));
        let wanted = wanted.map(|(source, element)| {
            let begin = self
                .sources
                .get(source as usize)
                .map_or(0, |one| one.offset * 8);
            (source, begin + element * self.bits)
        });
        if wanted == src {
            return Ok(());
        }
        let say = |one: Option<(u32, u64)>| match one {
            Some((source, bit)) => format!(
                "bit {bit} of the file of {:?}",
                self.sources
                    .get(source as usize)
                    .map_or("", |one| &one.name)
            ),
            None => "zero".to_owned(),
        };
        wrong(say(src), format!("{} at index {local:?}", say(wanted)))
    }

    /// Compares the corners of every copy, its first steps, and points in between.
    pub fn points(&self) -> Result<u64> {
        let mut count = 0;
        for Nest {
            source,
            src,
            dst,
            run,
            loops,
            ..
        } in &self.layout.nests
        {
            count += points(*run / self.bits, loops, |within, from, to| {
                let within = within * self.bits;
                self.one(dst + to + within, Some((*source, src + from + within)))
            })?;
        }
        for Fill { dst, run, loops } in &self.layout.fills {
            count += points(*run / self.bits, loops, |within, _, to| {
                self.one(dst + to + within * self.bits, None)
            })?;
        }
        Ok(count)
    }

    /// Compares all elements.
    pub fn all(&self) -> Result<()> {
        for nest in &self.layout.nests {
            all(
                nest.run / self.bits,
                &nest.loops,
                &mut |within, from, to| {
                    let within = within * self.bits;
                    let src = Some((nest.source, nest.src + from + within));
                    self.one(nest.dst + to + within, src)
                },
            )?;
        }
        for fill in &self.layout.fills {
            all(fill.run / self.bits, &fill.loops, &mut |within, _, to| {
                self.one(fill.dst + to + within * self.bits, None)
            })?;
        }
        Ok(())
    }
}

/// Points in between that are compared of every copy of more than a few elements.
const BETWEEN: u64 = 4;

/// Calls `each` with elements of a copy: which of its run, and the distances in the file and in the
/// tensor.
fn points(
    run: u64,
    loops: &[Loop],
    mut each: impl FnMut(u64, u64, u64) -> Result<()>,
) -> Result<u64> {
    let mut count = 0;
    let mut point = |within: u64, position: &dyn Fn(usize, &Loop) -> u64| {
        count += 1;
        let (mut from, mut to) = (0, 0);
        for (at, one) in loops.iter().enumerate() {
            let k = position(at, one);
            from += k * one.src;
            to += k * one.dst;
        }
        each(within, from, to)
    };
    let last = run.saturating_sub(1);
    point(0, &|_, _| 0)?;
    if last > 0 {
        point(1, &|_, _| 0)?;
        point(last, &|_, _| 0)?;
    }
    for which in 0..loops.len() {
        point(0, &|at, _| u64::from(at == which))?;
        point(0, &|at, one| if at == which { one.extent - 1 } else { 0 })?;
    }
    if !loops.is_empty() {
        point(last, &|_, one| one.extent - 1)?;
    }
    if run > 3 || !loops.is_empty() {
        let mut state = run ^ 0x9E37_79B9_7F4A_7C15;
        for one in loops {
            state =
                (state ^ one.extent ^ one.src.rotate_left(20)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        }
        for turn in 1..=BETWEEN {
            let mixed = |salt: u64| {
                let mixed = (state ^ (turn << 32 | salt)).wrapping_mul(0x94D0_49BB_1331_11EB);
                mixed ^ (mixed >> 31)
            };
            point(mixed(0) % run, &|at, one| mixed(at as u64 + 1) % one.extent)?;
        }
    }
    Ok(count)
}

fn all(run: u64, loops: &[Loop], each: &mut dyn FnMut(u64, u64, u64) -> Result<()>) -> Result<()> {
    match loops.split_first() {
        None => (0..run).try_for_each(|within| each(within, 0, 0)),
        Some((outer, inner)) => (0..outer.extent).try_for_each(|k| {
            all(run, inner, &mut |within, from, to| {
                each(within, from + k * outer.src, to + k * outer.dst)
            })
        }),
    }
}
