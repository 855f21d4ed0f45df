//! What tests share: a naive reference, in which a tensor is a list whose values are their own
//! indices, random numbers, and plans carried out on such lists.

#![allow(dead_code, reason = "each test uses some of it")]

use std::sync::Arc;

use tonnage_format::Dtype;
use tonnage_plan::{Expr, Loop, Others, Place, Placement, Plan, Request, Table, Uneven, Wanted};

/// An element: which source, and which of its elements. `None` is zero.
pub type Value = Option<(u32, u64)>;

/// A tensor as a plain list, row by row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Array {
    pub shape: Vec<u64>,
    pub data: Vec<Value>,
}

/// Every index of a shape, in row-major order.
pub fn indices(shape: &[u64]) -> Vec<Vec<u64>> {
    let mut all = vec![vec![]];
    for &extent in shape {
        let longer = |index: Vec<u64>| {
            (0..extent).map(move |i| {
                let mut index = index.clone();
                index.push(i);
                index
            })
        };
        all = all.into_iter().flat_map(longer).collect();
    }
    all
}

impl Array {
    pub fn source(number: u32, shape: &[u64]) -> Array {
        let count = shape.iter().product();
        Array {
            shape: shape.to_vec(),
            data: (0..count).map(|i| Some((number, i))).collect(),
        }
    }

    pub fn make(shape: &[u64], of: impl Fn(&[u64]) -> Value) -> Array {
        Array {
            shape: shape.to_vec(),
            data: indices(shape).iter().map(|index| of(index)).collect(),
        }
    }

    pub fn at(&self, index: &[u64]) -> Value {
        let place = index.iter().zip(&self.shape);
        self.data[place.fold(0, |sum, (i, n)| sum * n + i) as usize]
    }

    fn with(&self, dim: usize, extent: u64) -> Vec<u64> {
        let mut shape = self.shape.clone();
        shape[dim] = extent;
        shape
    }

    /// Takes these indices of a dimension; `None` gives zeros.
    pub fn take(&self, dim: usize, taken: &[Option<u64>]) -> Array {
        Array::make(&self.with(dim, taken.len() as u64), |index| {
            let mut from = index.to_vec();
            from[dim] = taken[index[dim] as usize]?;
            self.at(&from)
        })
    }

    pub fn slice(&self, dim: usize, start: u64, stop: u64, step: u64) -> Array {
        let taken: Vec<Option<u64>> = (start..stop).step_by(step as usize).map(Some).collect();
        self.take(dim, &taken)
    }

    pub fn concat(parts: &[Array], dim: usize) -> Array {
        let all: u64 = parts.iter().map(|part| part.shape[dim]).sum();
        Array::make(&parts[0].with(dim, all), |index| {
            let mut index = index.to_vec();
            for part in parts {
                if index[dim] < part.shape[dim] {
                    return part.at(&index);
                }
                index[dim] -= part.shape[dim];
            }
            unreachable!()
        })
    }

    pub fn stack(parts: &[Array], dim: usize) -> Array {
        let mut shape = parts[0].shape.clone();
        shape.insert(dim, parts.len() as u64);
        Array::make(&shape, |index| {
            let mut index = index.to_vec();
            let which = index.remove(dim);
            parts[which as usize].at(&index)
        })
    }

    pub fn permute(&self, order: &[usize]) -> Array {
        let shape: Vec<u64> = order.iter().map(|&dim| self.shape[dim]).collect();
        Array::make(&shape, |index| {
            let mut from = vec![0; order.len()];
            for (to, &dim) in order.iter().enumerate() {
                from[dim] = index[to];
            }
            self.at(&from)
        })
    }

    pub fn reshape(&self, shape: &[u64]) -> Array {
        Array {
            shape: shape.to_vec(),
            data: self.data.clone(),
        }
    }

    pub fn interleave(parts: &[Array], dim: usize) -> Array {
        let turns = parts.len() as u64;
        Array::make(&parts[0].with(dim, parts[0].shape[dim] * turns), |index| {
            let mut from = index.to_vec();
            from[dim] = index[dim] / turns;
            parts[(index[dim] % turns) as usize].at(&from)
        })
    }

    pub fn repeat(&self, dim: usize, times: u64) -> Array {
        let once: Vec<Option<u64>> = (0..self.shape[dim]).map(Some).collect();
        self.take(dim, &once.repeat(times as usize))
    }

    pub fn pad(&self, dim: usize, before: u64, after: u64) -> Array {
        let mut taken = vec![None; before as usize];
        taken.extend((0..self.shape[dim]).map(Some));
        taken.extend(vec![None; after as usize]);
        self.take(dim, &taken)
    }
}

/// What a coordinate has of a list of indices.
pub fn share(
    list: &[Option<u64>],
    size: u64,
    coord: u64,
    uneven: Uneven,
) -> Option<Vec<Option<u64>>> {
    let mut list = list.to_vec();
    let unit = match uneven {
        Uneven::Granular(unit) => unit,
        _ => 1,
    };
    match uneven {
        Uneven::PadTo(multiple) => {
            while !(list.len() as u64).is_multiple_of(multiple) {
                list.push(None);
            }
            if !(list.len() as u64).is_multiple_of(size) {
                return None;
            }
        }
        Uneven::Error if !(list.len() as u64).is_multiple_of(size) => return None,
        _ => {}
    }
    let units: Vec<&[Option<u64>]> = list.chunks(unit as usize).collect();
    let shares: Vec<Vec<Option<u64>>> = match uneven {
        Uneven::Balanced | Uneven::Granular(_) => {
            let mut rest = units.as_slice();
            (0..size as usize)
                .map(|at| {
                    let count = rest.len().div_ceil(size as usize - at);
                    let (mine, others) = rest.split_at(count);
                    rest = others;
                    mine.concat()
                })
                .collect()
        }
        _ => {
            let each = units.len().div_ceil(size as usize).max(1);
            units.chunks(each).map(<[_]>::concat).collect()
        }
    };
    Some(shares.get(coord as usize).cloned().unwrap_or_default())
}

/// What a placement leaves of a list of indices; the outer `None` where it cannot be.
pub fn placed(
    placement: &Placement,
    list: &[Option<u64>],
    size: u64,
    coord: u64,
) -> Option<Vec<Option<u64>>> {
    match placement {
        Placement::Shard { uneven, .. } => share(list, size, coord, *uneven),
        Placement::Strided { groups, uneven, .. } => {
            let cut = match uneven {
                Uneven::PadTo(_) => Uneven::Error,
                other => *other,
            };
            let parts = (0..*groups)
                .map(|group| share(&share(list, *groups, group, cut)?, size, coord, *uneven));
            Some(parts.collect::<Option<Vec<_>>>()?.concat())
        }
        Placement::Segments { sizes, each, .. } => {
            if sizes.iter().sum::<u64>() != list.len() as u64 {
                return None;
            }
            let mut rest = list;
            let parts = sizes.iter().zip(each).map(|(&extent, one)| {
                let (part, others) = rest.split_at(extent as usize);
                rest = others;
                placed(one, part, size, coord)
            });
            Some(parts.collect::<Option<Vec<_>>>()?.concat())
        }
        Placement::Heads {
            heads,
            head_dim,
            uneven,
            ..
        } => {
            if heads * head_dim != list.len() as u64 {
                return None;
            }
            let even = heads % size == 0 || size.is_multiple_of(*heads);
            if !even && *uneven != Uneven::Balanced {
                return None;
            }
            // Head of each seat: seats and heads are laid over the same line.
            let mine: Vec<u64> = if *heads < size {
                vec![coord * heads / size]
            } else {
                let all: Vec<Option<u64>> = (0..*heads).map(Some).collect();
                let mine = share(&all, size, coord, Uneven::Balanced)?;
                mine.into_iter().flatten().collect()
            };
            let head = |head: u64| {
                let from = (head * head_dim) as usize;
                list[from..from + *head_dim as usize].to_vec()
            };
            Some(mine.into_iter().flat_map(head).collect())
        }
        Placement::Replicate => Some(list.to_vec()),
        _ => None,
    }
}

/// What a rank has of a tensor: `None` where the placements cannot be, an inner `None` where it has
/// nothing.
pub fn local(array: &Array, axes: &[(u64, u64, &Placement)]) -> Option<Option<Array>> {
    let rank = array.shape.len();
    let mut lists: Vec<Vec<Option<u64>>> = array
        .shape
        .iter()
        .map(|&extent| (0..extent).map(Some).collect())
        .collect();
    let mut zeros = false;
    for &(size, coord, placement) in axes {
        let dim = match placement {
            Placement::Replicate => continue,
            Placement::Owner(coords) => {
                if !coords.contains(&(coord as u32)) {
                    return Some(None);
                }
                continue;
            }
            Placement::Only { coord: one, others } => {
                if u64::from(*one) != coord {
                    if *others == Others::Absent {
                        return Some(None);
                    }
                    zeros = true;
                }
                continue;
            }
            Placement::Shard { dim, .. }
            | Placement::Strided { dim, .. }
            | Placement::Segments { dim, .. }
            | Placement::Heads { dim, .. }
            | Placement::Blocks { dim, .. } => {
                (if *dim < 0 { *dim + rank as i64 } else { *dim }) as usize
            }
        };
        lists[dim] = placed(placement, &lists[dim], size, coord)?;
    }
    let mut found = array.clone();
    for (dim, list) in lists.iter().enumerate() {
        found = found.take(dim, list);
    }
    if zeros {
        found.data.fill(None);
    }
    Some(Some(found))
}

/// The local tensor that a plan's copies make. Panics where an element is filled twice or never.
pub fn carried_out(plan: &Plan, target: usize, rank: u32) -> Option<Array> {
    let target = &plan.targets()[target];
    let layout = target.layout(rank)?;
    let bits = target.dtype.bitsize() as u64;
    let mut data: Vec<Option<Value>> = vec![None; layout.elements() as usize];
    let mut put = |dst: u64, value: Value| {
        assert_eq!(dst % bits, 0);
        let old = data[(dst / bits) as usize].replace(value);
        assert_eq!(old, None, "filled twice");
    };
    for nest in &layout.nests {
        let source = &plan.sources()[nest.source as usize];
        walk(&nest.loops, &mut |src, dst| {
            for at in (0..nest.run).step_by(bits as usize) {
                let bit = nest.src + src + at - source.offset * 8;
                assert_eq!(bit % bits, 0);
                put(nest.dst + dst + at, Some((nest.source, bit / bits)));
            }
        });
    }
    for fill in &layout.fills {
        walk(&fill.loops, &mut |_, dst| {
            for at in (0..fill.run).step_by(bits as usize) {
                put(fill.dst + dst + at, None);
            }
        });
    }
    Some(Array {
        shape: layout.shape.to_vec(),
        data: data.into_iter().map(|one| one.expect("filled")).collect(),
    })
}

/// Calls `each` with the distances of every position of the loops.
pub fn walk(loops: &[Loop], each: &mut dyn FnMut(u64, u64)) {
    match loops.split_first() {
        None => each(0, 0),
        Some((one, inner)) => {
            for k in 0..one.extent {
                walk(inner, &mut |src, dst| {
                    each(src + k * one.src, dst + k * one.dst)
                });
            }
        }
    }
}

/// Random numbers: SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// A number of `0..below`.
    pub fn below(&mut self, below: u64) -> u64 {
        self.next() % below
    }

    pub fn within(&mut self, from: u64, to: u64) -> u64 {
        from + self.below(to - from + 1)
    }

    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len() as u64) as usize]
    }
}

/// A table of tensors that lie one behind the other in one file.
pub fn table(tensors: &[(&str, Dtype, &[u64])]) -> Table {
    let bytes = |one: &(&str, Dtype, &[u64])| {
        let bits = one.2.iter().product::<u64>() * one.1.bitsize() as u64;
        bits.div_ceil(8)
    };
    let mut table = Table::new();
    let file = table.add_file("model", 16 + tensors.iter().map(bytes).sum::<u64>());
    let mut offset = 16;
    for one in tensors {
        table
            .add(one.0, one.1, one.2, file, offset)
            .expect("a tensor that fits");
        offset += bytes(one);
    }
    table
}

/// A request for one tensor.
pub fn request(mesh: &[(&str, u32)], name: &str, expr: Option<Expr>, place: Place) -> Request {
    Request {
        mesh: mesh
            .iter()
            .map(|(name, size)| ((*name).to_owned(), *size))
            .collect(),
        targets: vec![Wanted {
            expr,
            place: Arc::new(place),
            ..Wanted::new(name, Place::new())
        }],
        ..Request::default()
    }
}

/// One placement of one axis.
pub fn on(axis: &str, placement: Placement) -> Place {
    Place::from([(axis.to_owned(), placement)])
}
