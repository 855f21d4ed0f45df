use proptest::prelude::*;

use super::*;

/// Columns `begin..begin + taken` of a matrix in a file, to a local tensor of their own.
fn columns(local: usize, offset: u64, rows: u64, width: u64, begin: u64, taken: u64) -> Copy {
    let axes = [(rows, width * 8, taken * 8), (taken, 8, 8)];
    let strided = Strided::new((offset + begin) * 8, 0, 8, axes)
        .unwrap()
        .unwrap();
    Copy {
        local,
        file: 0,
        strided,
    }
}

fn range(local: usize, offset: u64, len: u64) -> Copy {
    let strided = Strided::new(offset * 8, 0, len * 8, []).unwrap().unwrap();
    Copy {
        local,
        file: 0,
        strided,
    }
}

fn plan(copies: &[Copy], locals: usize, profile: &IoProfile) -> IoPlan {
    IoPlan::new(copies.to_vec(), locals, profile)
}

/// What a plan brings, byte by byte, from a file that is in memory.
fn run(plan: &IoPlan, file: &[u8], locals: &mut [Vec<u8>]) -> u64 {
    let mut asked = 0;
    for read in &plan.reads {
        match read {
            Read::Range {
                local,
                offset,
                dst,
                len,
                ..
            } => {
                let bytes = &file[*offset as usize..(offset + len) as usize];
                locals[*local][*dst as usize..(dst + len) as usize].copy_from_slice(bytes);
                asked += len;
            }
            Read::Runs(copy) => {
                assert!(copy.strided.copy(file, 0, &mut locals[copy.local], 0));
                asked += copy.strided.bytes();
            }
            Read::Block {
                offset,
                len,
                copies,
                ..
            } => {
                let bytes = &file[*offset as usize..(offset + len) as usize];
                for copy in copies.iter().map(|&at| &plan.copies[at]) {
                    copy.strided.within_src(*offset, offset + len, &mut |part| {
                        assert!(part.copy(bytes, *offset, &mut locals[copy.local], 0));
                    });
                }
                asked += len;
            }
        }
    }
    asked
}

const GIB: u64 = 1 << 30;

#[test]
fn a_range_is_read_straight_and_short_runs_by_blocks_or_one_by_one() {
    let profile = IoProfile::NVME;
    let rows = plan(&[range(0, 4096, GIB)], 1, &profile);
    assert_eq!(rows.reads.len(), 1);
    assert_eq!(
        (rows.needed, rows.read, rows.tensors[0].way),
        (GIB, GIB, Way::Ranges)
    );
    // 24 385 rows of 22 016 bytes, of which each rank has half, or an eighth.
    for (ranks, least, most) in [(2, 1.99, 2.01), (8, 7.9, 8.1)] {
        let copy = columns(0, 4096, 24_385, 22_016, 0, 22_016 / ranks);
        let cold = plan(std::slice::from_ref(&copy), 1, &profile);
        assert_eq!(cold.tensors[0].way, Way::Blocks);
        let amplification = cold.amplification();
        assert!((least..most).contains(&amplification), "{amplification}");
        assert_eq!(cold.tensors[0].read, cold.read);
        // What is cached is fastest run by run, as was measured.
        let cached = plan(&[copy], 1, &IoProfile::PAGE_CACHE);
        assert_eq!(cached.tensors[0].way, Way::Runs);
        assert_eq!(cached.amplification(), 1.0);
        assert!(cached.reads.len() < 200, "{}", cached.reads.len());
    }
    // Runs of a MiB are ranges, wherever they lie.
    let copy = columns(0, 0, 64, 8 << 20, 1 << 20, 1 << 20);
    let few = plan(&[copy], 1, &profile);
    assert_eq!((few.reads.len(), few.amplification()), (64, 1.0));
}

#[test]
fn a_stack_is_read_matrix_by_matrix() {
    // Of every other expert, half of each row; experts of 32 MiB.
    let (width, rows) = (4096, 8192);
    let axes = [
        (64, 2 * rows * width * 8, rows * width / 2 * 8),
        (rows, width * 8, width / 2 * 8),
        (width / 2, 8, 8),
    ];
    let strided = Strided::new(0, 0, 8, axes).unwrap().unwrap();
    let stack = plan(
        &[Copy {
            local: 0,
            file: 0,
            strided,
        }],
        1,
        &IoProfile::NVME,
    );
    assert!(
        (1.99..2.01).contains(&stack.amplification()),
        "{}",
        stack.amplification()
    );
}

#[test]
fn what_two_tensors_want_of_the_same_rows_is_read_once() {
    let (q, k) = (
        columns(0, 0, 10_000, 8192, 0, 2048),
        columns(1, 0, 10_000, 8192, 4096, 2048),
    );
    let both = plan(&[q, k], 2, &IoProfile::NVME);
    assert!(both.read <= 10_000 * 8192);
    assert!(both.tensors.iter().all(|tensor| tensor.way == Way::Blocks));
    let shares: u64 = both.tensors.iter().map(|tensor| tensor.read).sum();
    assert!(
        both.read.abs_diff(shares) < 100,
        "{} and {shares}",
        both.read
    );
}

#[test]
fn small_neighbours_are_read_together_within_a_limit() {
    // A rank's half of many small tensors: gaps as large as the pieces.
    let halves: Vec<Copy> = (0..1000)
        .map(|at| range(at, at as u64 * 2000, 1000))
        .collect();
    let made = plan(&halves, 1000, &IoProfile::NVME);
    assert_eq!(made.needed, 1_000_000);
    assert!(made.amplification() <= 1.05, "{}", made.amplification());
    // Small gaps cost nothing: one read.
    let close: Vec<Copy> = (0..1000)
        .map(|at| range(at, at as u64 * 1010, 1000))
        .collect();
    let made = plan(&close, 1000, &IoProfile::NVME);
    assert!(made.amplification() <= 1.05);
    assert_eq!(made.reads.len(), 1);
    // Without any, they stay ranges, which a vectored read joins.
    let dense: Vec<Copy> = (0..1000)
        .map(|at| range(at, at as u64 * 1000, 1000))
        .collect();
    let made = plan(&dense, 1000, &IoProfile::NVME);
    assert_eq!((made.reads.len(), made.amplification()), (1000, 1.0));
}

#[test]
fn a_norm_beside_a_column_shard_costs_no_more_than_it_is_long() {
    let columns = columns(0, 0, 1000, 4096, 0, 1024);
    let both = plan(
        &[columns, range(1, 1000 * 4096 - 3072, 2000)],
        2,
        &IoProfile::NVME,
    );
    assert_eq!(both.reads.len(), 1);
    assert_eq!(
        (both.tensors[1].way, both.tensors[1].read),
        (Way::Blocks, 2000)
    );
    assert_eq!(both.tensors[0].read + both.tensors[1].read, both.read);
}

#[test]
fn bytes_that_are_wanted_twice_are_read_once() {
    let axes = [(100, 0, 80), (10, 8, 8)];
    let strided = Strided::new(800, 0, 8, axes).unwrap().unwrap();
    let made = plan(
        &[Copy {
            local: 0,
            file: 0,
            strided,
        }],
        1,
        &IoProfile::NVME,
    );
    assert_eq!((made.needed, made.read), (10, 10));
    let file: Vec<u8> = (0..200).collect();
    let mut locals = [vec![0; 1000]];
    run(&made, &file, &mut locals);
    assert!(locals[0].chunks(10).all(|part| part == &file[100..110]));
}

#[test]
fn profiles_have_the_gaps_that_they_are_known_for() {
    let gaps: Vec<u64> = IoProfile::ALL.iter().map(IoProfile::gap).collect();
    assert_eq!(gaps, [140_000, 62_500, 2_343_750, 5180]);
    assert_eq!(IoProfile::named("s3"), Some(IoProfile::S3));
    assert_eq!(IoProfile::named("tape"), None);
}

#[test]
fn a_large_model_takes_few_objects() {
    // A rank of Llama-3-70B at TP = 8: 160 column shards of 1.3 million runs.
    let (mut copies, mut at) = (Vec::new(), 0);
    for local in 0..160 {
        let (rows, width) = (8192, if local % 2 == 0 { 16_384 } else { 57_344 });
        copies.push(columns(local, at, rows, width, width / 8, width / 8));
        at += rows * width;
    }
    for profile in IoProfile::ALL {
        let made = plan(&copies, 160, &profile);
        assert!(
            made.reads.len() < 20_000,
            "{}: {}",
            profile.name,
            made.reads.len()
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn every_plan_brings_what_is_wanted(
        shapes in prop::collection::vec((0_u64..40, 1_u64..200, 1_u64..100, any::<(u16, u16)>(), any::<bool>()), 1..8),
        profile in 0_usize..4,
        speed in 0_usize..3,
        block in 0_usize..3,
    ) {
        let mut copies = Vec::new();
        let mut at = 0;
        for (local, &(gap, rows, width, (begin, taken), again)) in shapes.iter().enumerate() {
            let begin = u64::from(begin) % width;
            let taken = u64::from(taken) % (width - begin) + 1;
            copies.push(columns(local, at + gap, rows, width, begin, taken));
            if !again {
                at += gap + rows * width;
            }
        }
        let end = copies.iter().map(|copy| copy.strided.src_end()).max().unwrap_or(0);
        let file: Vec<u8> = (0..end).map(|at| (at * 31 + at / 256) as u8).collect();
        let mut profile = IoProfile::ALL[profile];
        // Gaps of a few bytes, so that small files see every way.
        profile.latency = [1e-12, 1e-9, 1e-3][speed];
        profile.page = 0;
        profile.block = [1, 4096, 1 << 20][block];
        let made = plan(&copies, shapes.len(), &profile);
        let fresh = || copies.iter().map(|c| vec![0; c.strided.dst_end() as usize]).collect();
        let (mut found, mut wanted): (Vec<Vec<u8>>, Vec<Vec<u8>>) = (fresh(), fresh());
        let asked = run(&made, &file, &mut found);
        for copy in &copies {
            prop_assert!(copy.strided.copy(&file, 0, &mut wanted[copy.local], 0));
        }
        prop_assert_eq!(found, wanted);
        prop_assert_eq!(asked, made.read);
        prop_assert_eq!(made.needed, copies.iter().map(|copy| copy.strided.bytes()).sum::<u64>());
        let offsets: Vec<u64> = made.reads.iter().map(Read::offset).collect();
        prop_assert!(offsets.is_sorted());
        prop_assert_eq!(made.tensors.iter().map(|t| t.needed).sum::<u64>(), made.needed);
        prop_assert!(made.tensors.iter().all(|t| t.way != Way::Nothing));
    }
}
