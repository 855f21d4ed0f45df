//! The cases that loaders get wrong, one test each: what every rank has, element by element, or the
//! error that says why it cannot be.

mod common;

use std::sync::Arc;

use common::{Array, carried_out, on, request, table};
use tonnage_format::Dtype;
use tonnage_plan::{
    Allow, Dims, Error, Expr, Others, Part, Place, Placement, Plan, Reason, Request, Table, Uneven,
    Wanted, build,
};

const BF16: Dtype = Dtype::BF16;

fn shard(dim: i64) -> Placement {
    Placement::shard(dim)
}

fn uneven(dim: i64, uneven: Uneven) -> Placement {
    Placement::Shard { dim, uneven }
}

/// One tensor of this shape on one axis: the plan, and the error where it cannot be.
fn one(shape: &[u64], size: u32, placement: Placement) -> Result<Plan, Error> {
    let table = table(&[("w", BF16, shape)]);
    build(
        &table,
        &request(&[("tp", size)], "w", None, on("tp", placement)),
    )
}

fn plan(shape: &[u64], size: u32, placement: Placement) -> Plan {
    let plan = one(shape, size, placement).expect("a plan");
    plan.verify().expect("a plan that holds");
    plan.check_every_element(1 << 20)
        .expect("a plan that holds");
    plan
}

/// First index and number of the rows that each rank has, of a tensor that ranks have rows of.
fn rows(plan: &Plan) -> Vec<(u64, u64)> {
    (0..plan.mesh().size())
        .map(|rank| {
            let local = plan.rank(rank).unwrap().remove(0);
            (
                local.boxes.first().map_or(0, |one| one.global[0]),
                local.shape[0],
            )
        })
        .collect()
}

fn source(number: u32, shape: &[u64]) -> Array {
    Array::source(number, shape)
}

fn rank(plan: &Plan, target: usize, rank: u32) -> Array {
    carried_out(plan, target, rank).expect("a tensor")
}

#[test]
fn fewer_kv_heads_than_ranks_are_replicated_by_head() {
    let heads = Placement::Heads {
        dim: 0,
        heads: 2,
        head_dim: 4,
        uneven: Uneven::Error,
    };
    let found = plan(&[8, 3], 8, heads);
    let wanted: Vec<(u64, u64)> = (0..8).map(|rank| (rank / 4 * 4, 4)).collect();
    assert_eq!(rows(&found), wanted);
}

#[test]
fn a_head_is_never_split_though_the_rows_divide() {
    let heads = |heads, uneven| Placement::Heads {
        dim: 0,
        heads,
        head_dim: 8,
        uneven,
    };
    let found = plan(&[8, 3], 2, heads(1, Uneven::Error));
    assert_eq!(rows(&found), [(0, 8), (0, 8)]);
    // 48 rows divide by 4, but 6 heads don't.
    let error = one(&[48, 3], 4, heads(6, Uneven::Error)).unwrap_err();
    assert_eq!(error.reason(), Reason::Uneven);
    assert!(error.to_string().contains("6 heads over 4"), "{error}");
    let found = plan(&[48, 3], 4, heads(6, Uneven::Balanced));
    assert_eq!(rows(&found), [(0, 16), (16, 16), (32, 8), (40, 8)]);
    let found = plan(&[24, 3], 4, heads(3, Uneven::Balanced));
    assert_eq!(rows(&found), [(0, 8), (0, 8), (8, 8), (16, 8)]);
    assert_eq!(
        one(&[24, 3], 4, heads(3, Uneven::Torch))
            .unwrap_err()
            .reason(),
        Reason::Placement
    );
}

#[test]
fn fused_qkv_is_sharded_part_by_part() {
    let heads = |heads| Placement::Heads {
        dim: 0,
        heads,
        head_dim: 2,
        uneven: Uneven::Error,
    };
    let each = vec![heads(4), heads(1), heads(1)];
    let found = plan(
        &[12, 5],
        2,
        Placement::Segments {
            dim: 0,
            sizes: vec![8, 2, 2],
            each,
        },
    );
    let whole = source(0, &[12, 5]);
    for coord in 0..2 {
        let q = whole.slice(0, coord * 4, coord * 4 + 4, 1);
        let kv = whole.slice(0, 8, 12, 1);
        assert_eq!(rank(&found, 0, coord as u32), Array::concat(&[q, kv], 0));
    }
}

#[test]
fn segments_may_mix_shards_and_replicas() {
    // [q_a | kv_a]: the first part sharded, the second on every rank.
    let each = vec![shard(-1), Placement::Replicate];
    let found = plan(
        &[2, 7],
        2,
        Placement::Segments {
            dim: -1,
            sizes: vec![4, 3],
            each,
        },
    );
    let whole = source(0, &[2, 7]);
    for coord in 0..2 {
        let parts = [
            whole.slice(1, coord * 2, coord * 2 + 2, 1),
            whole.slice(1, 4, 7, 1),
        ];
        assert_eq!(rank(&found, 0, coord as u32), Array::concat(&parts, 1));
    }
    let wrong = |sizes: Vec<u64>, each| {
        one(
            &[2, 7],
            2,
            Placement::Segments {
                dim: 1,
                sizes,
                each,
            },
        )
    };
    assert_eq!(
        wrong(vec![4, 4], vec![shard(1); 2]).unwrap_err().reason(),
        Reason::Placement
    );
    assert_eq!(
        wrong(vec![4, 3], vec![shard(0); 2]).unwrap_err().reason(),
        Reason::Placement
    );
    let owner = vec![Placement::Owner(vec![0]); 2];
    assert_eq!(
        wrong(vec![4, 3], owner).unwrap_err().reason(),
        Reason::Placement
    );
}

#[test]
fn interleaved_qkv_of_groups_is_a_permutation() {
    // Megatron: [q q k v] a group of 2 query heads; heads of 3 rows, 4 groups.
    let (groups, per, dim, hidden) = (4_u64, 4_u64, 3_u64, 5_u64);
    let fused = [groups * per * dim, hidden];
    let table = table(&[("qkv", BF16, &fused)]);
    let grouped = Expr::Reshape {
        of: Box::new(Expr::source("qkv")),
        shape: vec![groups, per, dim, hidden],
    };
    let part = |start: u64, stop: u64| Expr::Reshape {
        of: Box::new(Expr::Slice {
            of: Box::new(grouped.clone()),
            dim: 1,
            start,
            stop,
            step: 1,
        }),
        shape: vec![groups * (stop - start) * dim, hidden],
    };
    let place = Arc::new(on("tp", shard(0)));
    let wanted = |name: &str, expr| Wanted {
        expr: Some(expr),
        place: place.clone(),
        ..Wanted::new(name, Place::new())
    };
    let asked = Request {
        mesh: vec![("tp".to_owned(), 2)],
        targets: vec![
            wanted("q", part(0, 2)),
            wanted("k", part(2, 3)),
            wanted("v", part(3, 4)),
        ],
        ..Request::default()
    };
    let found = build(&table, &asked).expect("three parts that tile the fused tensor");
    let whole = source(0, &fused).reshape(&[groups, per, dim, hidden]);
    for (target, (start, stop)) in [(0, 2), (2, 3), (3, 4)].into_iter().enumerate() {
        let rows = groups * (stop - start) * dim;
        let all = whole.slice(1, start, stop, 1).reshape(&[rows, hidden]);
        for coord in 0..2 {
            let half = all.slice(0, coord * rows / 2, (coord + 1) * rows / 2, 1);
            assert_eq!(rank(&found, target, coord as u32), half);
        }
        // Few copies: one, whatever the number of groups.
        assert_eq!(found.targets()[target].layouts[0].nests.len(), 1);
    }
}

#[test]
fn stacked_gate_and_up_are_strided_and_interleaved_ones_are_split_after_the_turn() {
    let stacked = plan(
        &[8, 3],
        2,
        Placement::Strided {
            dim: 0,
            groups: 2,
            uneven: Uneven::Torch,
        },
    );
    let whole = source(0, &[8, 3]);
    for coord in 0..2 {
        let gate = whole.slice(0, coord * 2, coord * 2 + 2, 1);
        let up = whole.slice(0, 4 + coord * 2, 6 + coord * 2, 1);
        assert_eq!(
            rank(&stacked, 0, coord as u32),
            Array::concat(&[gate, up], 0)
        );
    }
    // gate and up come from one tensor of alternate rows, and each is sharded by itself.
    let table = table(&[("gate_up", BF16, &[8, 3])]);
    let every = |start: u64| Expr::Slice {
        of: Box::new(Expr::source("gate_up")),
        dim: 0,
        start,
        stop: 8,
        step: 2,
    };
    let place = Arc::new(on("tp", shard(0)));
    let wanted = |name: &str, at| Wanted {
        expr: Some(every(at)),
        place: place.clone(),
        ..Wanted::new(name, Place::new())
    };
    let asked = Request {
        mesh: vec![("tp".to_owned(), 2)],
        targets: vec![wanted("gate", 0), wanted("up", 1)],
        ..Request::default()
    };
    let found = build(&table, &asked).expect("two that tile one");
    assert_eq!(
        rank(&found, 1, 1),
        whole.slice(0, 1, 8, 2).slice(0, 2, 4, 1)
    );
}

#[test]
fn a_fused_tensor_is_cut_before_it_is_sharded() {
    // Sharding the source and then cutting it gives rank 1 rows of the wrong part.
    let table = table(&[("qkvg", BF16, &[8, 3])]);
    let cut = Expr::Slice {
        of: Box::new(Expr::source("qkvg")),
        dim: 0,
        start: 2,
        stop: 4,
        step: 1,
    };
    let mut asked = request(&[("tp", 2)], "k", Some(cut), on("tp", shard(0)));
    let error = build(&table, &asked).unwrap_err();
    assert_eq!(
        (error.reason(), error.tensor_name()),
        (Reason::Unread, Some("qkvg"))
    );
    assert!(
        error
            .range_text()
            .unwrap()
            .starts_with("elements 0..6 of 24"),
        "{error}"
    );
    asked.unread = Allow::Some(vec!["qkv*".to_owned()]);
    let found = build(&table, &asked).expect("a part");
    assert_eq!(rank(&found, 0, 1), source(0, &[8, 3]).slice(0, 3, 4, 1));
}

#[test]
fn overlapping_parts_of_a_fused_tensor_are_refused() {
    let table = table(&[("kv", BF16, &[8])]);
    let cut = |start, stop| Expr::Slice {
        of: Box::new(Expr::source("kv")),
        dim: 0,
        start,
        stop,
        step: 1,
    };
    let wanted = |name: &str, expr| Wanted {
        expr: Some(expr),
        ..Wanted::new(name, Place::new())
    };
    let mut asked = Request {
        mesh: vec![("tp".to_owned(), 1)],
        targets: vec![wanted("k", cut(0, 5)), wanted("v", cut(4, 8))],
        ..Request::default()
    };
    let error = build(&table, &asked).unwrap_err();
    assert_eq!(
        (error.reason(), error.tensor_name()),
        (Reason::Repeated, Some("kv"))
    );
    assert!(
        error.range_text().unwrap().starts_with("elements 4..5"),
        "{error}"
    );
    asked.repeated = Allow::Some(vec!["kv".to_owned()]);
    build(&table, &asked).expect("what was declared");
}

#[test]
fn stacked_experts_read_their_owners_files_only() {
    let mut table = Table::new();
    let mut names = Vec::new();
    for expert in 0..4 {
        let file = table.add_file(&format!("{expert}"), 1 << 10);
        let name = format!("experts.{expert}.w");
        table.add(&name, BF16, &[3, 6], file, 8).unwrap();
        names.push(Expr::source(&name));
    }
    let stack = Expr::Stack { of: names, dim: 0 };
    let place = Place::from([("ep".to_owned(), shard(0)), ("tp".to_owned(), shard(2))]);
    let found = build(
        &table,
        &request(&[("ep", 2), ("tp", 2)], "experts.w", Some(stack), place),
    )
    .unwrap();
    let whole = Array::stack(&[0, 1, 2, 3].map(|at| source(at, &[3, 6])), 0);
    for at in 0..4 {
        let (ep, tp) = (u64::from(at / 2), u64::from(at % 2));
        let mine = whole
            .slice(0, ep * 2, ep * 2 + 2, 1)
            .slice(2, tp * 3, tp * 3 + 3, 1);
        assert_eq!(rank(&found, 0, at), mine);
        let layout = found.targets()[0].layout(at).unwrap();
        let files: Vec<u32> = layout.nests.iter().map(|nest| nest.file).collect();
        assert_eq!(files, [ep as u32 * 2, ep as u32 * 2 + 1]);
    }
}

#[test]
fn experts_go_round_robin_or_by_a_table_with_redundant_ones() {
    let table = table(&[("experts", BF16, &[4, 3])]);
    let row = |expert: u64| Expr::Slice {
        of: Box::new(Expr::source("experts")),
        dim: 0,
        start: expert,
        stop: expert + 1,
        step: 1,
    };
    let wanted = |expert: u64, owners: &[u32]| Wanted {
        expr: Some(row(expert)),
        ..Wanted::new(
            &format!("experts.{expert}"),
            on("ep", Placement::Owner(owners.to_vec())),
        )
    };
    let asked = Request {
        mesh: vec![("ep".to_owned(), 2)],
        targets: vec![
            wanted(0, &[0]),
            wanted(1, &[1]),
            wanted(2, &[0, 1]),
            wanted(3, &[1]),
        ],
        ..Request::default()
    };
    let found = build(&table, &asked).expect("each expert somewhere");
    let names = |rank| {
        found
            .rank(rank)
            .unwrap()
            .iter()
            .map(|one| one.name.to_string())
            .collect::<Vec<_>>()
    };
    assert_eq!(names(0), ["experts.0", "experts.2"]);
    assert_eq!(names(1), ["experts.1", "experts.2", "experts.3"]);
}

#[test]
fn a_padded_vocabulary_ends_in_zeros() {
    let found = plan(&[131, 2], 4, uneven(0, Uneven::PadTo(16)));
    assert_eq!(rows(&found), [(0, 36), (36, 36), (72, 36), (108, 36)]);
    let whole = source(0, &[131, 2]).pad(0, 0, 13);
    for at in 0..4 {
        assert_eq!(
            rank(&found, 0, at as u32),
            whole.slice(0, at * 36, at * 36 + 36, 1)
        );
    }
    let error = one(&[131, 2], 4, uneven(0, Uneven::PadTo(7))).unwrap_err();
    assert_eq!(
        (error.reason(), error.tensor_name()),
        (Reason::Uneven, Some("w"))
    );
    // So many zeros that the last ranks have nothing else.
    let found = plan(&[5, 2], 4, uneven(0, Uneven::PadTo(16)));
    assert_eq!(rows(&found), [(0, 4), (4, 4), (0, 4), (0, 4)]);
    assert!(found.targets()[0].layout(2).unwrap().nests.is_empty());
}

#[test]
fn dimensions_that_do_not_divide_follow_the_policy() {
    let torch = |n| rows(&plan(&[n], 4, shard(0)));
    assert_eq!(torch(131), [(0, 33), (33, 33), (66, 33), (99, 32)]);
    assert_eq!(torch(5), [(0, 2), (2, 2), (4, 1), (0, 0)]);
    let balanced = plan(&[5], 4, uneven(0, Uneven::Balanced));
    assert_eq!(rows(&balanced), [(0, 2), (2, 1), (3, 1), (4, 1)]);
    let granular = plan(&[1000], 3, uneven(0, Uneven::Granular(128)));
    assert_eq!(rows(&granular), [(0, 384), (384, 384), (768, 232)]);
    let error = one(&[131], 4, uneven(0, Uneven::Error)).unwrap_err();
    assert_eq!(error.reason(), Reason::Uneven);
    assert!(error.to_string().contains("131 indices over 4"), "{error}");
}

#[test]
fn a_bias_is_on_every_rank_or_added_once() {
    let replicated = plan(&[6], 3, Placement::Replicate);
    assert_eq!(replicated.targets()[0].layouts.len(), 1);
    let zeros = plan(
        &[6],
        3,
        Placement::Only {
            coord: 1,
            others: Others::Zeros,
        },
    );
    assert_eq!(rank(&zeros, 0, 1), source(0, &[6]));
    assert_eq!(rank(&zeros, 0, 2).data, [None; 6]);
    let absent = plan(
        &[6],
        3,
        Placement::Only {
            coord: 0,
            others: Others::Absent,
        },
    );
    assert_eq!(absent.rank(2).unwrap(), []);
    let error = one(
        &[6],
        3,
        Placement::Only {
            coord: 3,
            others: Others::Zeros,
        },
    )
    .unwrap_err();
    assert_eq!(error.reason(), Reason::Placement);
}

#[test]
fn tied_embeddings_are_one_source_of_two_targets() {
    let table = table(&[("embed", BF16, &[8, 2])]);
    let wanted = |name: &str, stage| Wanted {
        expr: Some(Expr::source("embed")),
        ..Wanted::new(name, on("pp", Placement::Owner(vec![stage])))
    };
    let asked = Request {
        mesh: vec![("pp".to_owned(), 2)],
        targets: vec![wanted("embed", 0), wanted("lm_head", 1)],
        ..Request::default()
    };
    let found = build(&table, &asked).expect("a tied tensor");
    assert_eq!(rank(&found, 0, 0), rank(&found, 1, 1));
    assert_eq!(found.rank(0).unwrap().len(), 1);
    assert_eq!(&*found.proof().unwrap().repeated[0], "embed");
}

#[test]
fn packed_weights_are_cut_at_whole_groups_and_their_scales_alike() {
    // GPTQ: eight weights a word along `in`, a scale for 32 of them.
    let (inputs, group) = (96_u64, 32_u64);
    let words = rows(&plan(
        &[inputs / 8, 4],
        2,
        uneven(0, Uneven::Granular(group / 8)),
    ));
    assert_eq!(words, [(0, 8), (8, 4)]);
    let scales = rows(&plan(&[inputs / group, 4], 2, uneven(0, Uneven::Balanced)));
    assert_eq!(scales, [(0, 2), (2, 1)]);
}

#[test]
fn the_order_of_activations_is_sharded_while_its_scales_stay_whole() {
    let table = table(&[
        ("qweight", Dtype::I32, &[8, 4]),
        ("g_idx", Dtype::I32, &[64]),
        ("scales", Dtype::F16, &[2, 4]),
    ]);
    let targets = vec![
        Wanted::new("qweight", on("tp", shard(0))),
        Wanted::new("g_idx", on("tp", shard(0))),
        Wanted::new("scales", on("tp", Placement::Replicate)),
    ];
    let asked = Request {
        mesh: vec![("tp".to_owned(), 2)],
        targets,
        ..Request::default()
    };
    let found = build(&table, &asked).unwrap();
    let shapes: Vec<Dims> = found
        .rank(1)
        .unwrap()
        .iter()
        .map(|one| one.shape.clone())
        .collect();
    assert_eq!(
        shapes.iter().map(|one| one.to_vec()).collect::<Vec<_>>(),
        [vec![4, 4], vec![32], vec![2, 4]]
    );
}

#[test]
fn block_scales_have_a_halo_and_say_where_in_a_block_they_begin() {
    // 576 rows over 2 ranks: 288 each, which is two blocks of 128 and a quarter.
    let blocks = Placement::Blocks {
        dim: 0,
        block: 128,
        extent: 576,
        uneven: Uneven::Torch,
    };
    let found = plan(&[5, 3], 2, blocks.clone());
    assert_eq!(rows(&found), [(0, 3), (2, 3)]);
    let phase = |rank| {
        found.targets()[0]
            .layout(rank)
            .unwrap()
            .block_phase
            .to_vec()
    };
    assert_eq!((phase(0), phase(1)), (vec![0, 0], vec![32, 0]));
    let error = one(&[4, 3], 2, blocks).unwrap_err();
    assert_eq!(error.reason(), Reason::Placement);
    // On two axes, the second divides what the first left of the weight.
    let table = table(&[("w", BF16, &[5, 3])]);
    let blocks = |extent| Placement::Blocks {
        dim: 0,
        block: 128,
        extent,
        uneven: Uneven::Torch,
    };
    let place = Place::from([
        ("fsdp".to_owned(), blocks(576)),
        ("tp".to_owned(), blocks(576)),
    ]);
    let found = build(
        &table,
        &request(&[("fsdp", 2), ("tp", 2)], "w", None, place),
    )
    .unwrap();
    assert_eq!(rows(&found), [(0, 2), (1, 2), (2, 2), (3, 2)]);
    found.check_every_element(1 << 10).unwrap();
}

#[test]
fn scales_of_a_fused_weight_are_sharded_in_segments_of_whole_blocks() {
    let blocks = |uneven| Placement::Blocks {
        dim: 0,
        block: 4,
        extent: 16,
        uneven,
    };
    let segments = |one: Placement| Placement::Segments {
        dim: 0,
        sizes: vec![4, 4],
        each: vec![one; 2],
    };
    let found = plan(&[8, 2], 2, segments(blocks(Uneven::Torch)));
    let whole = source(0, &[8, 2]);
    let parts = [whole.slice(0, 2, 4, 1), whole.slice(0, 6, 8, 1)];
    assert_eq!(rank(&found, 0, 1), Array::concat(&parts, 0));
    let error = one(&[8, 2], 3, segments(blocks(Uneven::Torch))).unwrap_err();
    assert_eq!(error.reason(), Reason::Uneven);
    assert!(one(&[8, 2], 3, segments(blocks(Uneven::Granular(4)))).is_ok());
}

#[test]
fn four_bit_elements_are_cut_at_whole_bytes_or_refused() {
    let four = |shape: &[u64], size, placement| {
        let table = table(&[("w", Dtype::F4, shape)]);
        build(
            &table,
            &request(&[("tp", size)], "w", None, on("tp", placement)),
        )
    };
    let found = four(&[4, 64], 2, shard(1)).expect("rows of 32 elements");
    let nest = &found.targets()[0].layout(1).unwrap().nests[0];
    assert_eq!(
        (nest.src, nest.run, nest.loops[0].src),
        (16 * 8 + 32 * 4, 32 * 4, 64 * 4)
    );
    found.check_every_element(1 << 10).unwrap();
    let error = four(&[4, 6], 2, shard(1)).unwrap_err();
    assert_eq!(
        (error.reason(), error.tensor_name()),
        (Reason::Granularity, Some("w"))
    );
    assert!(error.needed_text().contains("2 elements of F4"), "{error}");
    // Cut so that all parts but the last are whole bytes.
    four(&[4, 6], 2, uneven(1, Uneven::Granular(2))).expect("4 and 2 elements");
    let table = table(&[("w", Dtype::F6_E3M2, &[2, 8])]);
    let found = build(
        &table,
        &request(&[("tp", 2)], "w", None, on("tp", shard(1))),
    )
    .unwrap();
    assert_eq!(found.targets()[0].layout(1).unwrap().nests[0].run, 4 * 6);
}

#[test]
fn superblocks_are_not_cut() {
    let found = plan(&[2, 1024], 3, uneven(1, Uneven::Granular(256)));
    let widths: Vec<u64> = (0..3)
        .map(|rank| found.rank(rank).unwrap()[0].shape[1])
        .collect();
    assert_eq!(widths, [512, 256, 256]);
}

#[test]
fn pipeline_stages_count_their_layers_anew() {
    let table = table(&[
        ("layers.0.w", BF16, &[2]),
        ("layers.1.w", BF16, &[3]),
        ("layers.2.w", BF16, &[4]),
        ("layers.3.w", BF16, &[5]),
    ]);
    // Two virtual stages a rank: 0 and 2 on the first, 1 and 3 on the second.
    let wanted = |layer: u32| Wanted {
        local: Some(format!("layers.{}.w", layer / 2).into()),
        ..Wanted::new(
            &format!("layers.{layer}.w"),
            on("pp", Placement::Owner(vec![layer % 2])),
        )
    };
    let asked = Request {
        mesh: vec![("pp".to_owned(), 2)],
        targets: (0..4).map(wanted).collect(),
        ..Request::default()
    };
    let found = build(&table, &asked).unwrap();
    let local = found.rank(1).unwrap();
    let have: Vec<(&str, u64)> = local.iter().map(|one| (&*one.name, one.shape[0])).collect();
    assert_eq!(have, [("layers.0.w", 3), ("layers.1.w", 5)]);
    // Two tensors of one name on one rank are refused.
    let mut clash = asked.clone();
    clash.targets[2].local = Some("layers.0.w".into());
    assert_eq!(build(&table, &clash).unwrap_err().reason(), Reason::Form);
    // An owner that no coordinate is, and a tensor that nobody owns.
    let mut nobody = asked.clone();
    nobody.targets[1].place = Arc::new(on("pp", Placement::Owner(vec![])));
    assert_eq!(build(&table, &nobody).unwrap_err().reason(), Reason::Unread);
    nobody.targets[1].place = Arc::new(on("pp", Placement::Owner(vec![2])));
    assert_eq!(
        build(&table, &nobody).unwrap_err().reason(),
        Reason::Placement
    );
}

#[test]
fn experts_see_the_same_ranks_as_another_mesh() {
    let table = table(&[("experts", BF16, &[8, 2]), ("q", BF16, &[8, 2])]);
    let fsdp_of_tp = Place::from([
        (
            "fsdp".to_owned(),
            Placement::Strided {
                dim: 0,
                groups: 2,
                uneven: Uneven::Torch,
            },
        ),
        ("tp".to_owned(), shard(0)),
    ]);
    let asked = Request {
        mesh: vec![("fsdp".to_owned(), 2), ("tp".to_owned(), 2)],
        alt: vec![vec![("efsdp".to_owned(), 1), ("ep".to_owned(), 4)]],
        targets: vec![
            Wanted::new("experts", on("ep", shard(0))),
            Wanted::new("q", fsdp_of_tp),
        ],
        ..Request::default()
    };
    let found = build(&table, &asked).unwrap();
    assert_eq!(rows(&found), [(0, 2), (2, 2), (4, 2), (6, 2)]);
    // FSDP outside of tensor parallelism: rank (fsdp, tp) has the part of its tp's half.
    for (at, from) in [(0, 0), (1, 4), (2, 2), (3, 6)] {
        let mine = rank(&found, 1, at);
        let whole = source(1, &[8, 2]);
        // The order is DTensor's: fsdp takes one chunk of each half, tp then halves what is left.
        assert_eq!(mine, whole.slice(0, from, from + 2, 1), "rank {at}");
    }
    // Axes of two factorisations divide the same ranks twice.
    let mut both = asked.clone();
    both.targets[0].place = Arc::new(Place::from([
        ("ep".to_owned(), shard(0)),
        ("tp".to_owned(), shard(1)),
    ]));
    assert_eq!(build(&table, &both).unwrap_err().reason(), Reason::Mesh);
    both.targets[0].place = Arc::new(on("cp", shard(0)));
    assert_eq!(
        build(&table, &both).unwrap_err().reason(),
        Reason::UnknownAxis
    );
    both.alt = vec![vec![("ep".to_owned(), 8)]];
    assert_eq!(build(&table, &both).unwrap_err().reason(), Reason::Mesh);
    both.alt = vec![vec![("tp".to_owned(), 2), ("ep".to_owned(), 2)]];
    assert_eq!(build(&table, &both).unwrap_err().reason(), Reason::Mesh);
}

/// A tensor of which four ranks wrote a file each.
fn four_parts() -> Table {
    let mut table = Table::new();
    let mut parts = Vec::new();
    for at in 0..4 {
        let file = table.add_file(&format!("rank-{at}"), 1 << 10);
        let source = table.add_range("w".into(), BF16, &[2, 6], file, 8).unwrap();
        parts.push(Part::whole(source, &[at * 2, 0]));
    }
    table.add_parts("w", BF16, &[8, 6], parts).unwrap();
    table
}

#[test]
fn a_tensor_in_four_parts_is_resharded_to_eight_ranks_and_by_columns() {
    let table = four_parts();
    let whole = Array::concat(&[0, 1, 2, 3].map(|at| source(at, &[2, 6])), 0);
    for (size, dim) in [(8_u32, 0_usize), (3, 1), (2, 0)] {
        let asked = request(&[("tp", size)], "w", None, on("tp", shard(dim as i64)));
        let found = build(&table, &asked).unwrap();
        found.check_every_element(1 << 10).unwrap();
        assert_eq!(
            Plan::from_json(&found.to_json())
                .unwrap()
                .verify()
                .unwrap()
                .sources,
            4
        );
        let each = whole.shape[dim] / u64::from(size);
        for at in 0..u64::from(size) {
            let mine = whole.slice(dim, at * each, (at + 1) * each, 1);
            assert_eq!(rank(&found, 0, at as u32), mine);
        }
    }
}

#[test]
fn a_part_that_is_missing_or_there_twice_is_an_error() {
    for (at, reason) in [([4, 0], Reason::Destination), ([7, 0], Reason::View)] {
        let mut table = Table::new();
        let file = table.add_file("a", 1 << 10);
        let mut parts = Vec::new();
        for begin in [[0, 0], [2, 0], [4, 0], at] {
            let source = table.add_range("w".into(), BF16, &[2, 6], file, 8).unwrap();
            parts.push(Part::whole(source, &begin));
        }
        let error = match table.add_parts("w", BF16, &[8, 6], parts) {
            Err(error) => error,
            Ok(()) => build(&table, &request(&[("tp", 1)], "w", None, Place::new())).unwrap_err(),
        };
        assert_eq!((error.reason(), error.tensor_name()), (reason, Some("w")));
    }
}

#[test]
fn a_transposed_weight_is_a_permutation_or_another_dimension() {
    let table = table(&[("c_attn", BF16, &[4, 6])]);
    let turned = Expr::Permute {
        of: Box::new(Expr::source("c_attn")),
        dims: vec![1, 0],
    };
    let found = build(
        &table,
        &request(&[("tp", 2)], "w", Some(turned), on("tp", shard(0))),
    )
    .unwrap();
    let whole = source(0, &[4, 6]);
    assert_eq!(rank(&found, 0, 1), whole.permute(&[1, 0]).slice(0, 3, 6, 1));
    let strided = Placement::Strided {
        dim: 1,
        groups: 3,
        uneven: Uneven::Error,
    };
    let found = plan(&[4, 6], 2, strided);
    assert_eq!(
        rank(&found, 0, 1),
        whole.take(1, &[Some(1), Some(3), Some(5)])
    );
}

#[test]
fn lora_pairs_follow_the_weight_they_are_for() {
    let table = table(&[("A", BF16, &[2, 8]), ("B", BF16, &[6, 2])]);
    let asked = |a, b| Request {
        mesh: vec![("tp".to_owned(), 2)],
        targets: vec![Wanted::new("A", on("tp", a)), Wanted::new("B", on("tp", b))],
        ..Request::default()
    };
    let column = build(&table, &asked(Placement::Replicate, shard(0))).unwrap();
    assert_eq!(rank(&column, 1, 1), source(1, &[6, 2]).slice(0, 3, 6, 1));
    let row = build(&table, &asked(shard(1), Placement::Replicate)).unwrap();
    assert_eq!(rank(&row, 0, 1), source(0, &[2, 8]).slice(1, 4, 8, 1));
}

#[test]
fn tensors_without_dimensions_or_elements_are_ordinary() {
    let table = table(&[
        ("step", Dtype::F32, &[]),
        ("none", BF16, &[0, 4]),
        ("w", BF16, &[2]),
    ]);
    let targets = vec![
        Wanted::new("step", Place::new()),
        Wanted::new("none", on("tp", shard(1))),
        Wanted::new("w", on("tp", shard(0))),
    ];
    let asked = Request {
        mesh: vec![("tp".to_owned(), 4)],
        targets,
        ..Request::default()
    };
    let found = build(&table, &asked).unwrap();
    found.verify().unwrap();
    assert_eq!(rank(&found, 0, 3), source(0, &[]));
    assert_eq!(rank(&found, 1, 3).shape, [0, 1]);
    assert_eq!(rank(&found, 2, 3).shape, [0]);
    let error = one(&[], 2, shard(0)).unwrap_err();
    assert_eq!(
        (error.reason(), error.tensor_name()),
        (Reason::View, Some("w"))
    );
}

#[test]
fn a_cast_is_asked_for_and_the_bytes_stay_as_they_lie() {
    let table = table(&[("w", BF16, &[4])]);
    let mut asked = request(&[("tp", 2)], "w", None, on("tp", shard(0)));
    asked.targets[0].dtype = Some(Dtype::F32);
    let local = build(&table, &asked).unwrap().rank(0).unwrap().remove(0);
    assert_eq!(
        (local.dtype, local.cast, local.bytes()),
        (BF16, Some(Dtype::F32), 4)
    );
    asked.targets[0].dtype = Some(BF16);
    assert_eq!(
        build(&table, &asked).unwrap().rank(0).unwrap()[0].cast,
        None
    );
}

#[test]
fn a_tensor_that_no_target_takes_is_an_error_unless_it_may_stay_unread() {
    let table = table(&[("w", BF16, &[4]), ("rotary.inv_freq", BF16, &[3])]);
    let mut asked = request(&[("tp", 1)], "w", None, Place::new());
    let error = build(&table, &asked).unwrap_err();
    assert_eq!(
        (error.reason(), error.tensor_name()),
        (Reason::Unread, Some("rotary.inv_freq"))
    );
    assert!(
        error
            .range_text()
            .unwrap()
            .starts_with("elements 0..3 of 3"),
        "{error}"
    );
    asked.unread = Allow::Some(vec!["*.inv_freq".to_owned()]);
    let found = build(&table, &asked).unwrap();
    assert_eq!(&*found.proof().unwrap().unread[0], "rotary.inv_freq");
    asked.targets.push(Wanted::new("w2", Place::new()));
    let error = build(&table, &asked).unwrap_err();
    assert_eq!(
        (error.reason(), error.tensor_name()),
        (Reason::UnknownTensor, Some("w2"))
    );
}

#[test]
fn parts_may_be_boxes_of_what_a_rank_wrote() {
    // Two ranks wrote gate and up rows one behind the other, and the second ends in a row of zeros.
    let mut table = Table::new();
    let file = table.add_file("ranks", 1 << 10);
    let mut parts = Vec::new();
    let boxes = [(0, 0, 2), (0, 2, 2), (1, 0, 1), (1, 1, 1)];
    let at = [0, 3, 2, 5];
    for rank in 0..2 {
        table
            .add_range("w".into(), BF16, &[4, 3], file, rank * 24)
            .unwrap();
    }
    for ((source, start, rows), at) in boxes.into_iter().zip(at) {
        let of = Some((Dims::from_slice(&[start, 0]), Dims::from_slice(&[rows, 3])));
        parts.push(Part {
            source,
            at: Dims::from_slice(&[at, 0]),
            of,
        });
    }
    table.add_parts("w", BF16, &[6, 3], parts).unwrap();
    let mut asked = request(&[("tp", 3)], "w", None, on("tp", shard(0)));
    assert_eq!(build(&table, &asked).unwrap_err().reason(), Reason::Unread);
    asked.unread = Allow::ALL;
    let found = build(&table, &asked).unwrap();
    found.check_every_element(1 << 10).unwrap();
    let row = |source_: u32, at: u64| source(source_, &[4, 3]).slice(0, at, at + 1, 1);
    assert_eq!(
        rank(&found, 0, 1),
        Array::concat(&[row(1, 0), row(0, 2)], 0)
    );
    let again = Plan::from_json(&found.to_json()).unwrap();
    again.verify().unwrap();
    assert_eq!(again, found);
}
