//! Random chains of views, on random meshes with random placements, give what plain lists of indices
//! give; and every plan verifies, also as it comes back from JSON.

mod common;

use common::{Array, Random, carried_out, local, request, table};
use tonnage_format::Dtype;
use tonnage_plan::{Allow, Expr, Others, Place, Placement, Plan, Reason, Table, Uneven, build};

const CASES: usize = 12_000;

/// A chain of operations over `sources`, as an expression and as a list.
fn chain(random: &mut Random, sources: &[(String, Array)]) -> (Expr, Array) {
    let (name, array) = random.pick(sources).clone();
    let (mut expr, mut array) = (Expr::source(&name), array);
    for _ in 0..random.below(6) {
        let (next, list) = step(random, &expr, &array, sources);
        if list.data.len() > 400 || list.shape.len() > 5 {
            continue;
        }
        (expr, array) = (next, list);
    }
    (expr, array)
}

fn signed(random: &mut Random, dim: usize, rank: usize) -> i64 {
    match random.below(2) {
        0 => dim as i64,
        _ => dim as i64 - rank as i64,
    }
}

fn step(
    random: &mut Random,
    expr: &Expr,
    array: &Array,
    sources: &[(String, Array)],
) -> (Expr, Array) {
    let rank = array.shape.len();
    let of = Box::new(expr.clone());
    let choice = random.below(9);
    if rank == 0 || choice == 0 {
        let dim = random.below(rank as u64 + 1) as usize;
        let others = with_same_shape(random, expr, array, sources);
        let list: Vec<Array> = others.iter().map(|one| one.1.clone()).collect();
        let dim_given = signed(random, dim, rank + 1);
        let of = others.into_iter().map(|one| one.0).collect();
        return (Expr::Stack { of, dim: dim_given }, Array::stack(&list, dim));
    }
    let at = random.below(rank as u64) as usize;
    let dim = signed(random, at, rank);
    let extent = array.shape[at];
    match choice {
        1 | 2 => {
            let start = random.within(0, extent);
            let stop = random.within(start, extent);
            let step = random.within(1, 4);
            let cut = Expr::Slice {
                of,
                dim,
                start,
                stop,
                step,
            };
            (cut, array.slice(at, start, stop, step))
        }
        3 => {
            let cut = random.within(0, extent);
            let part = |start, stop| Expr::Slice {
                of: of.clone(),
                dim,
                start,
                stop,
                step: 1,
            };
            let exprs = [part(cut, extent), part(0, cut), expr.clone()];
            let lists = [
                array.slice(at, cut, extent, 1),
                array.slice(at, 0, cut, 1),
                array.clone(),
            ];
            let count = random.within(2, 3) as usize;
            let of = exprs[..count].to_vec();
            (Expr::Concat { of, dim }, Array::concat(&lists[..count], at))
        }
        4 => {
            let mut order: Vec<usize> = (0..rank).collect();
            for i in (1..rank).rev() {
                order.swap(i, random.below(i as u64 + 1) as usize);
            }
            let dims = order.iter().map(|&one| signed(random, one, rank)).collect();
            (Expr::Permute { of, dims }, array.permute(&order))
        }
        5 => {
            let shape = factors(random, array.data.len() as u64);
            (
                Expr::Reshape {
                    of,
                    shape: shape.clone(),
                },
                array.reshape(&shape),
            )
        }
        6 => {
            let others = with_same_shape(random, expr, array, sources);
            let list: Vec<Array> = others.iter().map(|one| one.1.clone()).collect();
            let of = others.into_iter().map(|one| one.0).collect();
            (Expr::Interleave { of, dim }, Array::interleave(&list, at))
        }
        7 => {
            let times = random.within(0, 3);
            (Expr::Repeat { of, dim, times }, array.repeat(at, times))
        }
        _ => {
            let (before, after) = (random.below(3), random.below(3));
            (
                Expr::Pad {
                    of,
                    dim,
                    before,
                    after,
                },
                array.pad(at, before, after),
            )
        }
    }
}

/// One to three operands of the shape of `array`.
fn with_same_shape(
    random: &mut Random,
    expr: &Expr,
    array: &Array,
    sources: &[(String, Array)],
) -> Vec<(Expr, Array)> {
    let mut found = vec![(expr.clone(), array.clone())];
    for (name, other) in sources {
        if other.data.len() == array.data.len() && random.below(2) == 0 {
            let of = Box::new(Expr::source(name));
            let shape = array.shape.clone();
            found.push((
                Expr::Reshape {
                    of,
                    shape: shape.clone(),
                },
                other.reshape(&shape),
            ));
        }
    }
    found.truncate(3);
    found
}

/// A random shape of so many elements.
fn factors(random: &mut Random, mut count: u64) -> Vec<u64> {
    if count == 0 {
        return vec![random.below(3), 0];
    }
    let mut shape = Vec::new();
    while count > 1 && shape.len() < 3 {
        let divisors: Vec<u64> = (1..=count).filter(|n| count.is_multiple_of(*n)).collect();
        let one = *random.pick(&divisors);
        shape.push(one);
        count /= one;
    }
    shape.push(count);
    shape
}

fn uneven(random: &mut Random) -> Uneven {
    match random.below(7) {
        0 => Uneven::Error,
        1 | 2 => Uneven::Balanced,
        3 => Uneven::PadTo(random.within(1, 6)),
        4 => Uneven::Granular(random.within(1, 3)),
        _ => Uneven::Torch,
    }
}

/// A placement along `dim`, of a dimension that has `extent` indices now.
fn along(random: &mut Random, dim: i64, extent: u64, depth: usize) -> Placement {
    match random.below(if depth == 0 { 5 } else { 4 }) {
        0 => Placement::Strided {
            dim,
            groups: random.within(1, 4),
            uneven: uneven(random),
        },
        1 if extent > 0 => {
            let divisors: Vec<u64> = (1..=extent).filter(|n| extent.is_multiple_of(*n)).collect();
            let heads = *random.pick(&divisors);
            let uneven = *random.pick(&[Uneven::Error, Uneven::Balanced]);
            Placement::Heads {
                dim,
                heads,
                head_dim: extent / heads,
                uneven,
            }
        }
        2 if depth > 0 => Placement::Replicate,
        4 => {
            let first = random.within(0, extent);
            let second = random.within(0, extent - first);
            let sizes = vec![first, second, extent - first - second];
            let each = sizes
                .iter()
                .map(|&n| along(random, dim, n, depth + 1))
                .collect();
            Placement::Segments { dim, sizes, each }
        }
        _ => Placement::Shard {
            dim,
            uneven: uneven(random),
        },
    }
}

fn placement(random: &mut Random, array: &Array, size: u32) -> Placement {
    let rank = array.shape.len();
    let whole = random.below(8);
    if rank == 0 || whole < 3 {
        return match whole {
            0 => {
                let mut coords: Vec<u32> = (0..size).filter(|_| random.below(2) == 0).collect();
                if coords.is_empty() {
                    coords.push(random.below(u64::from(size)) as u32);
                }
                Placement::Owner(coords)
            }
            1 => Placement::Only {
                coord: random.below(u64::from(size)) as u32,
                others: *random.pick(&[Others::Absent, Others::Zeros]),
            },
            _ => Placement::Replicate,
        };
    }
    let dim = random.below(rank as u64) as usize;
    let given = signed(random, dim, rank);
    along(random, given, array.shape[dim], 0)
}

struct Case {
    table: Table,
    mesh: Vec<(String, u32)>,
    expr: Expr,
    array: Array,
    place: Place,
}

fn case(random: &mut Random) -> Case {
    const DTYPES: &[Dtype] = &[
        Dtype::F32,
        Dtype::BF16,
        Dtype::U8,
        Dtype::F4,
        Dtype::F6_E2M3,
    ];
    let dtype = *random.pick(DTYPES);
    let whole = match dtype {
        Dtype::F4 => 2,
        Dtype::F6_E2M3 => 4,
        _ => 1,
    };
    let mut sources = Vec::new();
    for at in 0..random.within(1, 3) {
        let mut shape: Vec<u64> = (0..random.below(4)).map(|_| random.within(1, 5)).collect();
        if random.below(40) == 0 {
            shape.push(0);
        }
        while shape.iter().product::<u64>() % whole != 0 {
            shape.push(whole);
        }
        sources.push((format!("s{at}"), Array::source(at as u32, &shape)));
    }
    let rows: Vec<(&str, Dtype, &[u64])> = sources
        .iter()
        .map(|(name, one)| (name.as_str(), dtype, one.shape.as_slice()))
        .collect();
    let table = table(&rows);
    let (expr, array) = chain(random, &sources);
    let names = ["a", "b", "c"];
    let mesh: Vec<(String, u32)> = (0..random.within(1, 3))
        .map(|at| (names[at as usize].to_owned(), random.within(1, 4) as u32))
        .collect();
    let mut place = Place::new();
    for (name, size) in &mesh {
        if random.below(4) > 0 {
            place.insert(name.clone(), placement(random, &array, *size));
        }
    }
    Case {
        table,
        mesh,
        expr,
        array,
        place,
    }
}

/// What each rank should have; `None` where the placements cannot be.
fn wanted(case: &Case) -> Option<Vec<Option<Array>>> {
    let size: u32 = case.mesh.iter().map(|axis| axis.1).product();
    let of = |rank: u32| {
        let mut behind = size;
        let mut axes = Vec::new();
        for (name, size) in &case.mesh {
            behind /= size;
            if let Some(placement) = case.place.get(name) {
                axes.push((u64::from(*size), u64::from(rank / behind % size), placement));
            }
        }
        local(&case.array, &axes)
    };
    (0..size).map(of).collect()
}

#[test]
fn plans_do_what_lists_of_indices_do() {
    let (mut same, mut refused, mut granular) = (0, 0, 0);
    let mut seed = 0;
    while same < CASES {
        seed += 1;
        let case = case(&mut Random(seed));
        let mesh: Vec<(&str, u32)> = case.mesh.iter().map(|(n, s)| (n.as_str(), *s)).collect();
        let mut asked = request(&mesh, "t", Some(case.expr.clone()), case.place.clone());
        asked.unread = Allow::ALL;
        asked.repeated = Allow::ALL;
        let wanted = wanted(&case);
        let plan = match (build(&case.table, &asked), &wanted) {
            (Ok(plan), Some(_)) => plan,
            (Err(error), _) if error.reason() == Reason::Granularity => {
                assert!(case.table.sources()[0].dtype.bitsize() < 8);
                granular += 1;
                continue;
            }
            (Err(error), None) => {
                let reason = error.reason();
                assert!(
                    matches!(reason, Reason::Uneven | Reason::Placement),
                    "{seed}: {error:?}"
                );
                refused += 1;
                continue;
            }
            (Err(error), Some(_)) => panic!("{seed}: {error:?}\n{}", asked.to_json()),
            (Ok(_), None) => panic!("{seed}: what cannot be was planned\n{}", asked.to_json()),
        };
        for (rank, wanted) in wanted.iter().flatten().enumerate() {
            let found = carried_out(&plan, 0, rank as u32);
            assert_eq!(
                &found,
                wanted,
                "{seed}: rank {rank} of\n{}",
                asked.to_json()
            );
        }
        plan.check_every_element(1 << 20)
            .unwrap_or_else(|error| panic!("{seed}: {error}"));
        let again =
            Plan::from_json(&plan.to_json()).unwrap_or_else(|error| panic!("{seed}: {error}"));
        assert_eq!(again, plan, "{seed}");
        assert_eq!(again.digest(), plan.digest(), "{seed}");
        again
            .verify()
            .unwrap_or_else(|error| panic!("{seed}: {error:?}\n{}", asked.to_json()));
        same += 1;
    }
    // Not a test of refusals.
    assert!(
        refused < CASES / 2 && granular < CASES / 4,
        "{refused} {granular}"
    );
    assert!(refused > 100 && granular > 100, "{refused} {granular}");
}
