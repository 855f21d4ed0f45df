use proptest::prelude::*;
use tonnage_format::Dtype;

use super::choose::{LOOPBACK, Mode, NETWORK, Where, choose};
use super::share::Share;
use super::*;
use crate::io::{Copy, IoPlan, IoProfile, Read};
use crate::{Allow, Place, Placement, Request, Table, Uneven, Wanted, build};

/// A file of these tensors, and a plan that places them.
fn plan(mesh: &[(&str, u32)], tensors: &[(Dtype, Vec<u64>, Place)]) -> Plan {
    let mut table = Table::new();
    let len: u64 = tensors
        .iter()
        .map(|(dtype, shape, _)| bytes(*dtype, shape) + 8)
        .sum();
    let file = table.add_file("model", 64 + len);
    let mut at = 64;
    let mut targets = Vec::new();
    for (number, (dtype, shape, place)) in tensors.iter().enumerate() {
        let name = format!("t{number}");
        table.add(&name, *dtype, shape, file, at).unwrap();
        at += bytes(*dtype, shape) + number as u64 % 2 * 8;
        targets.push(Wanted::new(&name, place.clone()));
    }
    let request = Request {
        mesh: mesh
            .iter()
            .map(|(name, size)| ((*name).to_owned(), *size))
            .collect(),
        targets,
        unread: Allow::ALL,
        repeated: Allow::ALL,
        ..Request::default()
    };
    build(&table, &request).unwrap()
}

fn bytes(dtype: Dtype, shape: &[u64]) -> u64 {
    shape.iter().product::<u64>() * dtype.bitsize() as u64 / 8
}

fn content(len: u64) -> Vec<u8> {
    (0..len)
        .map(|at| (at * 31 + at / 251 + at / 65_521) as u8)
        .collect()
}

/// What a rank's tensors hold, by the plan's copies alone: the reference.
fn naive(plan: &Plan, rank: u32, file: &[u8]) -> Vec<Vec<u8>> {
    let locals = plan.rank(rank).unwrap();
    let mut made: Vec<Vec<u8>> = locals
        .iter()
        .map(|local| vec![0; local.bytes() as usize])
        .collect();
    for copy in io::copies(&locals).unwrap() {
        assert!(copy.strided.copy(file, 0, &mut made[copy.local], 0));
    }
    made
}

/// Memory that counts how often each byte is written.
struct Memory {
    bytes: Vec<Vec<u8>>,
    times: Vec<Vec<u8>>,
}

impl Memory {
    fn new(lens: impl Iterator<Item = u64>) -> Memory {
        let bytes: Vec<Vec<u8>> = lens.map(|len| vec![0; len as usize]).collect();
        Memory {
            times: bytes.clone(),
            bytes,
        }
    }

    fn put(&mut self, local: usize, copy: &Strided, from: &[u8], base: u64) {
        assert!(
            copy.copy(from, base, &mut self.bytes[local], 0),
            "{copy:?} of tensor {local}"
        );
        let run = copy.run as usize;
        let times = &mut self.times[local];
        copy.for_each_run(&mut |_, dst| {
            times[dst as usize..dst as usize + run]
                .iter_mut()
                .for_each(|one| *one += 1);
            Ok::<(), ()>(())
        })
        .unwrap();
    }

    /// Carries out reads of one file; counts how often each byte of it is read.
    fn run(&mut self, io: &IoPlan, file: &[u8], read: &mut [u8]) {
        let mut count = |from: u64, len: u64| {
            read[from as usize..(from + len) as usize]
                .iter_mut()
                .for_each(|one| *one += 1);
        };
        for one in &io.reads {
            match one {
                Read::Range {
                    local,
                    offset,
                    dst,
                    len,
                    ..
                } => {
                    count(*offset, *len);
                    let (src, run) = (*offset, *len);
                    let copy = Strided {
                        src,
                        dst: *dst,
                        run,
                        axes: Default::default(),
                    };
                    self.put(*local, &copy, file, 0);
                }
                Read::Runs(Copy { local, strided, .. }) => {
                    let run = strided.run;
                    strided
                        .for_each_run(&mut |src, _| {
                            count(src, run);
                            Ok::<(), ()>(())
                        })
                        .unwrap();
                    self.put(*local, strided, file, 0);
                }
                Read::Block {
                    offset,
                    len,
                    copies,
                    ..
                } => {
                    count(*offset, *len);
                    let part = &file[*offset as usize..(offset + len) as usize];
                    for copy in copies.iter().map(|&at| &io.copies[at]) {
                        (copy.strided).within_src(*offset, offset + len, &mut |strided| {
                            self.put(copy.local, &strided, part, *offset);
                        });
                    }
                }
            }
        }
    }
}

/// Carries out an exchange among members in this process. Gives how often each byte of the file was read.
fn carry_out(plan: &Plan, exchange: &Exchange, file: &[u8]) -> Vec<u8> {
    let members = exchange.members().len();
    let mut read = vec![0_u8; file.len()];
    let shares: Vec<Share<'_>> = (0..members)
        .map(|at| exchange.share(plan, at).unwrap())
        .collect();
    let mut memory: Vec<Memory> = exchange
        .members()
        .iter()
        .map(|&rank| {
            let locals = plan.rank(rank).unwrap();
            Memory::new(
                locals
                    .iter()
                    .map(|local| local.bytes())
                    .chain([1 << 20, 1 << 20]),
            )
        })
        .collect();
    for (share, memory) in shares.iter().zip(&mut memory) {
        memory.run(&share.direct(&IoProfile::NVME), file, &mut read);
    }
    for round in 0..exchange.rounds().len() {
        match exchange.means() {
            Means::Window { half } => {
                window(round, half, exchange, &shares, &mut memory, file, &mut read)
            }
            Means::Messages { buffers, .. } => {
                messages(
                    round,
                    buffers,
                    exchange,
                    &shares,
                    &mut memory,
                    file,
                    &mut read,
                );
            }
        }
    }
    for (&rank, memory) in exchange.members().iter().zip(&memory) {
        for (local, (bytes, times)) in naive(plan, rank, file)
            .iter()
            .zip(memory.bytes.iter().zip(&memory.times))
        {
            assert_eq!(local, bytes);
            assert!(
                times.iter().all(|&times| times == 1),
                "a byte filled not exactly once"
            );
        }
    }
    let read_by: Vec<u64> = exchange.read().to_vec();
    assert!(read_by.iter().sum::<u64>() >= read.iter().map(|&times| u64::from(times)).sum::<u64>());
    read
}

fn window(
    round: usize,
    half: u64,
    exchange: &Exchange,
    shares: &[Share<'_>],
    memory: &mut [Memory],
    file: &[u8],
    read: &mut [u8],
) {
    assert!(exchange.rounds()[round].window <= half);
    let mut window = vec![0xee; half as usize];
    let mut written = vec![false; half as usize];
    for share in shares {
        for (_, offset, len, place) in share.window_reads(round) {
            let (from, to) = (offset as usize, place as usize);
            let len = len as usize;
            read[from..from + len].iter_mut().for_each(|one| *one += 1);
            window[to..to + len].copy_from_slice(&file[from..from + len]);
            assert!(written[to..to + len].iter().all(|written| !written));
            written[to..to + len].fill(true);
        }
    }
    let mut ignored = vec![0; window.len()];
    for (share, memory) in shares.iter().zip(memory) {
        memory.run(&share.window_takes(round), &window, &mut ignored);
    }
}

fn messages(
    round: usize,
    buffers: u64,
    exchange: &Exchange,
    shares: &[Share<'_>],
    memory: &mut [Memory],
    file: &[u8],
    read: &mut [u8],
) {
    let mut sent: Vec<Vec<Vec<u8>>> = Vec::new();
    let mut broadcasts: Vec<Vec<u8>> = Vec::new();
    for (share, memory) in shares.iter().zip(memory.iter_mut()) {
        let (splits, locals) = (share.splits(round), share.locals());
        let sum = splits.send.iter().sum::<u64>();
        for (at, len) in [(locals, sum), (locals + 1, share.broadcast_len(round))] {
            memory.bytes[at] = vec![0; len as usize];
            memory.times[at] = vec![0; len as usize];
        }
        memory.run(&share.reads(round), file, read);
        assert!(
            memory.times[locals..]
                .iter()
                .flatten()
                .all(|&times| times == 1)
        );
        let mut message = &memory.bytes[locals][..];
        let parts = splits.send.iter().map(|&len| {
            let (part, rest) = message.split_at(len as usize);
            message = rest;
            part.to_vec()
        });
        sent.push(parts.collect());
        broadcasts.push(memory.bytes[locals + 1].clone());
        let got = splits.receive.iter().sum::<u64>();
        let longest = exchange
            .broadcasts(round)
            .iter()
            .map(|one| one.1)
            .max()
            .unwrap_or(0);
        let held = sum + got + share.broadcast_len(round) + longest;
        assert!(held <= buffers, "{held} of {buffers}");
    }
    for (member, (share, memory)) in shares.iter().zip(memory.iter_mut()).enumerate() {
        let splits = share.splits(round);
        let got: Vec<u8> = sent.iter().flat_map(|from| from[member].clone()).collect();
        assert_eq!(got.len() as u64, splits.receive.iter().sum::<u64>());
        memory.run(&share.message_takes(round), &got, &mut vec![0; got.len()]);
        let mut next = vec![0; shares.len()];
        for (position, (reader, len)) in exchange.broadcasts(round).into_iter().enumerate() {
            let from = &mut next[reader as usize];
            let bytes = &broadcasts[reader as usize][*from..*from + len as usize];
            *from += len as usize;
            memory.run(
                &share.broadcast_takes(round, position),
                bytes,
                &mut vec![0; bytes.len()],
            );
        }
    }
}

fn placement() -> impl Strategy<Value = Placement> {
    prop_oneof![
        2 => Just(Placement::Replicate),
        4 => (0_i64..3).prop_map(|dim| Placement::Shard { dim, uneven: Uneven::Torch }),
        1 => (0_i64..2).prop_map(|dim| Placement::Strided { dim, groups: 2, uneven: Uneven::Torch }),
        1 => Just(Placement::Owner(vec![0])),
    ]
}

fn dtype() -> impl Strategy<Value = Dtype> {
    prop_oneof![
        Just(Dtype::U8),
        Just(Dtype::BF16),
        Just(Dtype::F32),
        Just(Dtype::F64),
        Just(Dtype::F8_E4M3),
        Just(Dtype::F4),
    ]
}

type Tensor = (Dtype, Vec<u64>, Place);

fn tensor(axes: &'static [&'static str]) -> impl Strategy<Value = Tensor> {
    let shape = prop::collection::vec(prop_oneof![6 => 1_u64..70, 1 => Just(0)], 0..4);
    let places = prop::collection::vec(placement(), axes.len());
    (dtype(), shape, places).prop_map(move |(dtype, mut shape, places)| {
        if dtype == Dtype::F4 {
            // Whole bytes wherever it is cut.
            shape.push(2);
        }
        let plain = shape.len() - usize::from(dtype == Dtype::F4);
        let fits = |placement: &Placement| match placement {
            Placement::Shard { dim, .. } | Placement::Strided { dim, .. } => {
                (*dim as usize) < plain
            }
            _ => true,
        };
        let places = axes.iter().zip(places).filter(|(_, place)| fits(place));
        (
            dtype,
            shape,
            places
                .map(|(axis, place)| ((*axis).to_owned(), place))
                .collect(),
        )
    })
}

fn means() -> impl Strategy<Value = Means> {
    prop_oneof![
        (15_u64..19).prop_map(|power| Means::Window { half: 3 << power }),
        (17_u64..21, any::<bool>()).prop_map(|(power, own)| Means::Messages {
            buffers: 1 << power,
            own
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn every_tensor_is_filled_once_and_every_byte_read_once(
        tensors in prop::collection::vec(tensor(&["pp", "tp"]), 1..8),
        (pp, tp) in (1_u32..3, 1_u32..4),
        group in any::<u8>(),
        means in means(),
    ) {
        let plan = plan(&[("pp", pp), ("tp", tp)], &tensors);
        let members: Vec<u32> = (0..pp * tp).filter(|rank| group >> rank & 1 == 0).collect();
        prop_assume!(!members.is_empty());
        let file = content(plan.files()[0].len);
        let exchange = Exchange::build(&plan, &members, means).unwrap();
        let read = carry_out(&plan, &exchange, &file);
        prop_assert!(read.iter().all(|&times| times <= 1), "a byte read twice");
        // What somebody needs is read.
        for &rank in &members {
            for copy in io::copies(&plan.rank(rank).unwrap()).unwrap() {
                copy.strided.for_each_run(&mut |src, _| {
                    let run = &read[src as usize..(src + copy.strided.run) as usize];
                    if run.iter().all(|&times| times == 1) { Ok(()) } else { Err(()) }
                }).unwrap();
            }
        }
        // Everybody comes to the same.
        let again = Exchange::build(&plan, &members, means).unwrap();
        prop_assert_eq!(&again.batches, &exchange.batches);
        prop_assert_eq!(&again.rounds, &exchange.rounds);
        prop_assert_eq!(&again.direct, &exchange.direct);
    }
}

fn shard(dim: i64) -> Place {
    let placement = Placement::Shard {
        dim,
        uneven: Uneven::Torch,
    };
    [("tp".to_owned(), placement)].into_iter().collect()
}

/// A layer's matrices of 16 MiB, and a norm: by rows, by columns, whole.
fn layer() -> Vec<Tensor> {
    vec![
        (Dtype::BF16, vec![4096, 2048], shard(0)),
        (Dtype::BF16, vec![2048, 4096], shard(1)),
        (Dtype::BF16, vec![4096], Place::new()),
        (Dtype::BF16, vec![1024, 4096], Place::new()),
    ]
}

#[test]
fn rows_are_read_by_their_owner_and_the_rest_in_fair_parts() {
    let plan = plan(&[("tp", 4)], &layer());
    let members = [0, 1, 2, 3];
    let exchange = Exchange::build(&plan, &members, Means::Window { half: 24 << 20 }).unwrap();
    for member in 0..4 {
        let direct: u64 = exchange.direct(member).iter().map(|piece| piece.len).sum();
        assert_eq!((direct, exchange.direct(member).len()), (4 << 20, 1));
    }
    let (least, most) = (exchange.read().iter().min(), exchange.read().iter().max());
    assert!(
        most.unwrap() - least.unwrap() <= BATCH,
        "{:?}",
        exchange.read()
    );
    let all: u64 = layer()
        .iter()
        .map(|(dtype, shape, _)| bytes(*dtype, shape))
        .sum();
    assert_eq!(exchange.read().iter().sum::<u64>(), all);
}

#[test]
fn what_all_need_whole_is_broadcast_in_large_batches() {
    let plan = plan(&[("tp", 4)], &layer());
    let means = Means::Messages {
        buffers: 128 << 20,
        own: false,
    };
    let exchange = Exchange::build(&plan, &[0, 1, 2, 3], means).unwrap();
    let broadcasts: u64 = (0..exchange.rounds().len())
        .flat_map(|round| exchange.broadcasts(round))
        .map(|(_, len)| len)
        .sum();
    assert_eq!(broadcasts, (8 << 20) + 8192);
    let large = exchange
        .batches
        .iter()
        .filter(|batch| batch.len >= 6 << 20)
        .count();
    assert!(
        large + 2 >= exchange.batches.len(),
        "{:?}",
        exchange.batches.len()
    );
}

#[test]
fn a_mutated_exchange_is_refused() {
    let plan = plan(&[("tp", 2)], &layer());
    let means = Means::Messages {
        buffers: 8 << 20,
        own: false,
    };
    let made = || Exchange::build(&plan, &[0, 1], means).unwrap();
    let refused = |change: &dyn Fn(&mut Exchange)| {
        let mut exchange = made();
        change(&mut exchange);
        assert_eq!(exchange.prove().unwrap_err().reason(), Reason::Destination);
    };
    made().prove().unwrap();
    refused(&|exchange| exchange.blocks[0].len -= 2);
    refused(&|exchange| exchange.blocks[1].offset -= 2);
    refused(&|exchange| exchange.blocks[0].wants.clear());
    refused(&|exchange| exchange.direct[1].clear());
    refused(&|exchange| exchange.direct.swap(0, 1));
    refused(&|exchange| exchange.batches.truncate(1));
    refused(&|exchange| exchange.rounds.truncate(1));
    refused(&|exchange| exchange.batches[0].reader = 2);
    refused(&|exchange| exchange.batches[0].blocks.extend([0]));
}

#[test]
fn groups_that_cannot_be_are_refused() {
    let plan = plan(&[("tp", 2)], &layer());
    let means = Means::Window { half: 24 << 20 };
    for members in [&[][..], &[0, 0], &[0, 2]] {
        let refused = Exchange::build(&plan, members, means).unwrap_err();
        assert_eq!(refused.reason(), Reason::Mesh);
    }
    for means in [
        Means::Window { half: 100 },
        Means::Messages {
            buffers: 100,
            own: true,
        },
    ] {
        let refused = Exchange::build(&plan, &[0, 1], means).unwrap_err();
        assert_eq!(refused.reason(), Reason::Limit);
    }
}

#[test]
fn the_way_is_chosen_by_what_it_costs() {
    let plan = plan(&[("tp", 4)], &layer());
    let members = [0, 1, 2, 3];
    let place = |profile, cached, shared, nodes: [u32; 4], fabric| Where {
        nodes: nodes.to_vec(),
        profile,
        cached,
        shared,
        fabric,
    };
    let mode = |place: &Where| choose(&plan, &members, place).unwrap().mode;
    let one = [0; 4];
    // A local disk, whose cache all share.
    assert_eq!(
        mode(&place(IoProfile::NVME, true, false, one, Some(LOOPBACK))),
        Mode::Direct
    );
    assert_eq!(
        mode(&place(
            IoProfile::PAGE_CACHE,
            true,
            false,
            one,
            Some(LOOPBACK)
        )),
        Mode::Direct
    );
    // A network: the window on one machine, messages between machines.
    assert_eq!(
        mode(&place(IoProfile::NFS, false, true, one, Some(LOOPBACK))),
        Mode::Shm
    );
    let two = [0, 0, 1, 1];
    let apart = [0, 1, 2, 3];
    assert_eq!(
        mode(&place(IoProfile::NFS, false, true, apart, Some(NETWORK))),
        Mode::Collective
    );
    assert_eq!(
        mode(&place(IoProfile::S3, false, true, two, Some(NETWORK))),
        Mode::Collective
    );
    // Machines that have a disk each, and nobody to talk to.
    assert_eq!(
        mode(&place(IoProfile::NVME, true, false, two, Some(NETWORK))),
        Mode::Direct
    );
    assert_eq!(
        mode(&place(IoProfile::NFS, false, true, apart, None)),
        Mode::Direct
    );
    // Where nobody needs what another does, nothing is gained.
    let rows = super::tests::plan(&[("tp", 4)], &[(Dtype::F32, vec![4096, 4096], shard(0))]);
    let rows = choose(
        &rows,
        &members,
        &place(IoProfile::NFS, false, true, one, Some(NETWORK)),
    )
    .unwrap();
    assert_eq!(rows.mode, Mode::Direct);
}
