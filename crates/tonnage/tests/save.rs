//! Saving: names, layouts and bytes are those of the reference and the Hub, one file or many, from memory,
//! from another checkpoint, or streamed; what an earlier save left is tidied, and nothing else.

mod common;

use std::fs;
use std::path::Path;

use common::{Tensor, content, content_of, model, names, refs};
use tonnage::engine::Cancel;
use tonnage::format::TensorSpec;
use tonnage::{
    Checkpoint, Content, Dtype, Durability, Item, SMALL, Save, Writer, cast, save, save_items,
    to_bytes,
};

fn limit(max: u64) -> Save<'static> {
    Save {
        max_shard_size: Some(max),
        durability: Durability::None,
        ..Save::default()
    }
}

fn quick() -> Save<'static> {
    Save {
        durability: Durability::None,
        ..Save::default()
    }
}

fn specs(tensors: &[Tensor]) -> Vec<TensorSpec<'_>> {
    tensors
        .iter()
        .map(|t| TensorSpec {
            name: &t.name,
            dtype: t.dtype,
            shape: &t.shape,
        })
        .collect()
}

fn stream(path: &Path, tensors: &[Tensor], options: &Save<'_>) {
    let mut writer = Writer::create(path, options).unwrap();
    refs(tensors)
        .iter()
        .for_each(|tensor| writer.add(tensor).unwrap());
    writer.finish().unwrap();
}

fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    names(folder)
        .into_iter()
        .map(|name| (name.clone(), fs::read(folder.join(name)).unwrap()))
        .collect()
}

#[test]
fn one_file_has_the_references_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let tensors: Vec<Tensor> = model(1)
        .into_iter()
        .filter(|t| t.dtype != Dtype::F4)
        .collect();
    let metadata = vec![("format".to_owned(), "pt".to_owned())];
    let options = Save {
        metadata: metadata.clone(),
        ..Save::default()
    };
    let saved = save(&refs(&tensors), &path, &options).unwrap();
    assert_eq!((saved.files, saved.index), (vec![path.clone()], None));
    assert_eq!(
        saved.total_size,
        tensors.iter().map(|t| t.data.len() as u64).sum::<u64>()
    );
    assert_eq!(saved.report.bytes, saved.total_size);
    let views = tensors.iter().map(|t| {
        let dtype: safetensors::Dtype = serde_json::from_value(t.dtype.name().into()).unwrap();
        let shape = t.shape.iter().map(|&n| n as usize).collect();
        (
            &t.name,
            safetensors::tensor::TensorView::new(dtype, shape, &t.data).unwrap(),
        )
    });
    let reference = safetensors::serialize(views, Some(metadata.into_iter().collect())).unwrap();
    assert_eq!(fs::read(&path).unwrap(), reference);
    assert_eq!(to_bytes(&refs(&tensors), &options).unwrap(), reference);
}

#[test]
fn several_files_are_named_split_and_indexed_as_the_hub_does() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = model(1);
    // embed takes 6400 bytes: more than a file may, so it stands alone and comes first.
    let saved = save(&refs(&tensors), folder.path(), &limit(4200)).unwrap();
    let expected: Vec<String> = (1..=3)
        .map(|i| format!("model-{i:05}-of-00003.safetensors"))
        .collect();
    let mut all = expected.clone();
    all.push("model.safetensors.index.json".to_owned());
    assert_eq!(names(folder.path()), all);
    assert_eq!(
        saved.files,
        expected
            .iter()
            .map(|name| folder.path().join(name))
            .collect::<Vec<_>>()
    );
    let text = fs::read_to_string(saved.index.unwrap()).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["metadata"]["total_size"], saved.total_size);
    for (name, file) in [
        ("embed.weight", 0),
        ("layers.0.up", 1),
        ("layers.0.down", 1),
        ("layers.1.up", 2),
        ("mask", 2),
    ] {
        assert_eq!(json["weight_map"][name], *expected[file], "{name}");
    }
    // Indented by two, keys sorted, a line end at the end: `serde_json` sorts keys as well.
    assert_eq!(text, serde_json::to_string_pretty(&json).unwrap() + "\n");
    assert_eq!(
        content(&Checkpoint::open(folder.path()).unwrap()),
        content_of(&tensors)
    );
}

#[test]
fn a_save_over_any_other_leaves_exactly_its_own_files() {
    let folder = tempfile::tempdir().unwrap();
    let keep = [
        "config.json",
        "other-00001-of-00002.safetensors.bak",
        "notes.txt",
    ];
    keep.iter()
        .for_each(|name| fs::write(folder.path().join(name), name).unwrap());
    let sizes = [
        u64::MAX,
        4200,
        4200,
        2100,
        u64::MAX,
        2100,
        9000,
        u64::MAX,
        u64::MAX,
    ];
    for (seed, max) in sizes.into_iter().enumerate() {
        for streamed in [false, true] {
            let tensors = model(seed as u64 * 100 + u64::from(streamed));
            if streamed {
                stream(folder.path(), &tensors, &limit(max));
            } else {
                save(&refs(&tensors), folder.path(), &limit(max)).unwrap();
            }
            let checkpoint = Checkpoint::open(folder.path()).unwrap();
            assert_eq!(content(&checkpoint), content_of(&tensors));
            let count = checkpoint.files().len();
            let expected = keep.len() + if count == 1 { 1 } else { count + 1 };
            assert_eq!(
                names(folder.path()).len(),
                expected,
                "{:?}",
                names(folder.path())
            );
            assert!(keep.iter().all(|name| folder.path().join(name).exists()));
        }
    }
}

#[test]
fn a_numbered_set_without_an_index_is_replaced_too() {
    let folder = tempfile::tempdir().unwrap();
    save(&refs(&model(1)), folder.path(), &limit(4200)).unwrap();
    fs::remove_file(folder.path().join("model.safetensors.index.json")).unwrap();
    save(&refs(&model(2)), folder.path(), &quick()).unwrap();
    assert_eq!(names(folder.path()), ["model.safetensors"]);
    assert_eq!(
        content(&Checkpoint::open(folder.path()).unwrap()),
        content_of(&model(2))
    );
}

#[test]
fn a_single_file_may_be_numbered_and_have_an_index() {
    let folder = tempfile::tempdir().unwrap();
    let numbered = Save {
        numbered: true,
        ..quick()
    };
    let both = [
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    ];
    // Over nothing, over itself, over one plain file, over several; and a plain one over it.
    for before in [
        None,
        Some(numbered.clone()),
        Some(quick()),
        Some(limit(4200)),
    ] {
        if let Some(options) = before {
            save(&refs(&model(1)), folder.path(), &options).unwrap();
        }
        let saved = save(&refs(&model(2)), folder.path(), &numbered).unwrap();
        assert_eq!(names(folder.path()), both);
        assert_eq!(saved.files, [folder.path().join(both[0])]);
        assert_eq!(saved.index, Some(folder.path().join(both[1])));
        let found = Checkpoint::open(folder.path()).unwrap();
        assert!(found.notes().is_empty(), "{:?}", found.notes());
        assert_eq!(content(&found), content_of(&model(2)));
    }
    save(&refs(&model(3)), folder.path(), &quick()).unwrap();
    assert_eq!(names(folder.path()), ["model.safetensors"]);
}

#[test]
fn a_path_of_a_file_gives_files_beside_it_under_its_name() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("model.safetensors"), b"someone else's").unwrap();
    let saved = save(
        &refs(&model(1)),
        folder.path().join("lora.safetensors"),
        &limit(4200),
    )
    .unwrap();
    assert_eq!(
        saved.index,
        Some(folder.path().join("lora.safetensors.index.json"))
    );
    assert!(saved.files.iter().all(|file| {
        file.file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .starts_with("lora-0000")
    }));
    assert_eq!(
        content(&Checkpoint::open(saved.index.unwrap()).unwrap()),
        content_of(&model(1))
    );
    assert_eq!(
        fs::read(folder.path().join("model.safetensors")).unwrap(),
        b"someone else's"
    );
}

#[test]
fn a_writer_gives_the_bytes_of_save_in_either_mode() {
    let top = tempfile::tempdir().unwrap();
    let tensors = model(5);
    for (case, max) in [None, Some(4200), Some(2100), Some(1)]
        .into_iter()
        .enumerate()
    {
        let options = Save {
            max_shard_size: max,
            metadata: vec![("k".into(), "v".into())],
            ..quick()
        };
        let at = |name: &str| top.path().join(format!("{name}{case}"));
        save(&refs(&tensors), at("save"), &options).unwrap();
        stream(&at("stream"), &tensors, &options);
        let mut writer = Writer::declared(at("declared"), &specs(&tensors), &options).unwrap();
        for tensor in tensors.iter().rev() {
            writer
                .begin(&tensor.name, tensor.dtype, &tensor.shape)
                .unwrap();
            tensor
                .data
                .chunks(1000)
                .for_each(|chunk| writer.write(chunk).unwrap());
            writer.end().unwrap();
        }
        let saved = writer.finish().unwrap();
        assert_eq!(
            saved.total_size,
            tensors.iter().map(|t| t.data.len() as u64).sum::<u64>()
        );
        assert!(
            files(&at("save")) == files(&at("stream")),
            "{:?}",
            names(&at("stream"))
        );
        assert!(
            files(&at("save")) == files(&at("declared")),
            "{:?}",
            names(&at("declared"))
        );
    }
    // Nothing at all is a checkpoint, too.
    save(&[], top.path().join("empty"), &quick()).unwrap();
    stream(&top.path().join("empty-stream"), &[], &quick());
    Writer::declared(top.path().join("empty-declared"), &[], &quick())
        .unwrap()
        .finish()
        .unwrap();
    assert_eq!(
        files(&top.path().join("empty")),
        files(&top.path().join("empty-stream"))
    );
    assert_eq!(
        files(&top.path().join("empty")),
        files(&top.path().join("empty-declared"))
    );
}

#[test]
fn a_large_stream_is_not_copied_and_one_that_lies_askew_is() {
    let top = tempfile::tempdir().unwrap();
    let large = Tensor::new("large", Dtype::F32, &[SMALL / 4], 1);
    let small = Tensor::new("small", Dtype::U8, &[3], 2);
    let straight = top.path().join("straight.safetensors");
    stream(&straight, &[large.clone(), small.clone()], &quick());
    let checkpoint = Checkpoint::open(&straight).unwrap();
    assert_eq!(
        checkpoint.files()[0].data_start,
        tonnage::ROOM,
        "the header went into the room that was left"
    );
    assert_eq!(checkpoint.read("large").unwrap(), large.data);
    assert_eq!(checkpoint.read("small").unwrap(), small.data);
    let askew = top.path().join("askew.safetensors");
    stream(&askew, &[small.clone(), large.clone()], &quick());
    assert!(fs::read(&askew).unwrap() == to_bytes(&refs(&[small, large]), &quick()).unwrap());
    assert_eq!(
        names(top.path()),
        ["askew.safetensors", "straight.safetensors"]
    );
}

#[test]
fn a_writer_that_is_misused_or_dropped_leaves_what_was_there() {
    let folder = tempfile::tempdir().unwrap();
    save(&refs(&model(1)), folder.path(), &limit(4200)).unwrap();
    let before = files(folder.path());
    let code = |result: tonnage::Result<()>| result.unwrap_err().code();
    let mut writer = Writer::create(folder.path(), &limit(100)).unwrap();
    assert_eq!(code(writer.write(b"x")), "WRITER");
    assert_eq!(code(writer.end()), "WRITER");
    assert_eq!(
        code(writer.begin("__metadata__", Dtype::U8, &[1])),
        "WRITE_RESERVED_NAME"
    );
    assert_eq!(
        code(writer.begin("odd", Dtype::F4, &[3])),
        "WRITE_PARTIAL_BYTE"
    );
    assert_eq!(
        code(writer.begin("huge", Dtype::U8, &[u64::MAX, 2])),
        "WRITE_SIZE"
    );
    writer.begin("a", Dtype::U8, &[4]).unwrap();
    assert_eq!(code(writer.begin("b", Dtype::U8, &[4])), "WRITER");
    assert_eq!(code(writer.write(b"12345")), "WRITE_SIZE");
    writer.write(b"123").unwrap();
    assert_eq!(code(writer.end()), "WRITE_SIZE");
    writer.write(b"4").unwrap();
    writer.end().unwrap();
    assert_eq!(code(writer.begin("a", Dtype::U8, &[4])), "WRITE_DUPLICATE");
    writer.begin("half", Dtype::U8, &[400]).unwrap();
    writer.write(b"half of it").unwrap();
    assert_eq!(code(writer.finish().map(drop)), "WRITER");
    assert!(files(folder.path()) == before);

    let tensors = model(2);
    let mut writer = Writer::declared(folder.path(), &specs(&tensors), &limit(4200)).unwrap();
    assert_eq!(code(writer.begin("undeclared", Dtype::U8, &[1])), "WRITER");
    assert_eq!(code(writer.begin("mask", Dtype::I8, &[3, 5, 7])), "WRITER");
    writer.add(&refs(&tensors)[0]).unwrap();
    assert_eq!(code(writer.add(&refs(&tensors)[0])), "WRITE_DUPLICATE");
    assert_eq!(code(writer.finish().map(drop)), "WRITER");
    assert!(files(folder.path()) == before);
    let twice = [specs(&tensors)[0], specs(&tensors)[0]];
    assert_eq!(
        Writer::declared(folder.path(), &twice, &quick())
            .unwrap_err()
            .code(),
        "WRITE_DUPLICATE"
    );
}

#[test]
fn a_checkpoint_is_saved_over_itself_renamed_cast_and_split() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = model(3);
    save(&refs(&tensors), folder.path(), &limit(4200)).unwrap();
    let source = Checkpoint::open(folder.path()).unwrap();
    let renamed: Vec<String> = source.names().map(|name| format!("m.{name}")).collect();
    let items: Vec<Item<'_>> = source
        .iter()
        .zip(&renamed)
        .map(|(tensor, name)| {
            let from = tensor.dtype().unwrap();
            let dtype = if cast::castable(from, Dtype::F32) {
                Dtype::F32
            } else {
                from
            };
            Item {
                name,
                dtype,
                shape: tensor.shape(),
                content: Content::Stored(tensor),
            }
        })
        .collect();
    save_items(&items, folder.path(), &limit(5000)).unwrap();
    let made = content(&Checkpoint::open(folder.path()).unwrap());
    assert_eq!(made.len(), tensors.len());
    for tensor in &tensors {
        let (dtype, shape, data) = &made[&format!("m.{}", tensor.name)];
        assert_eq!(*shape, tensor.shape);
        if *dtype == tensor.dtype {
            assert_eq!(*data, tensor.data);
        } else {
            let mut expected = vec![0; data.len()];
            cast::cast(tensor.dtype, &tensor.data, Dtype::F32, &mut expected).unwrap();
            assert_eq!((*dtype, data), (Dtype::F32, &expected));
        }
    }
}

#[test]
fn what_cannot_be_saved_is_refused_before_anything_is_touched() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let good = Tensor::new("a", Dtype::U8, &[4], 1);
    let mut short = good.clone();
    short.data.pop();
    let reserved = Tensor::new("__metadata__", Dtype::U8, &[4], 1);
    for (tensors, code) in [
        (vec![good.clone(), good.clone()], "WRITE_DUPLICATE"),
        (vec![short], "WRITE_SIZE"),
        (vec![reserved], "WRITE_RESERVED_NAME"),
    ] {
        for max in [1, u64::MAX] {
            assert_eq!(
                save(&refs(&tensors), &path, &limit(max))
                    .unwrap_err()
                    .code(),
                code
            );
        }
        assert_eq!(
            to_bytes(&refs(&tensors), &quick()).unwrap_err().code(),
            code
        );
    }
    let cancel = Cancel::new();
    cancel.cancel();
    let options = Save {
        cancel: Some(&cancel),
        ..quick()
    };
    assert_eq!(
        save(&refs(std::slice::from_ref(&good)), &path, &options)
            .unwrap_err()
            .code(),
        "CANCELLED"
    );
    let mut writer = Writer::create(&path, &options).unwrap();
    assert_eq!(
        writer.add(&refs(&[good])[0]).unwrap_err().code(),
        "CANCELLED"
    );
    drop(writer);
    assert!(names(folder.path()).is_empty());
    let stem = Save {
        stem: "../x".to_owned(),
        ..quick()
    };
    assert_eq!(
        save(&[], folder.path(), &stem).unwrap_err().code(),
        "WRITER"
    );
}

#[test]
fn what_a_killed_save_left_is_swept_but_not_what_an_index_names() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let old = std::time::SystemTime::now() - std::time::Duration::from_secs(48 * 60 * 60);
    let hidden =
        |n: u8| format!(".model-00001-of-00002.safetensors.{n}.0123456789abcdef.safetensors");
    let make = |name: &str| {
        fs::write(at(name), to_bytes(&refs(&model(1)), &quick()).unwrap()).unwrap();
        fs::File::options()
            .write(true)
            .open(at(name))
            .unwrap()
            .set_modified(old)
            .unwrap();
    };
    (1..=3).for_each(|n| make(&hidden(n)));
    make(".other.safetensors.1.0123456789abcdef.safetensors");
    // A save was killed just after its commit.
    let map: Vec<String> = model(1)
        .iter()
        .map(|t| format!(r#""{}":"{}""#, t.name, hidden(2)))
        .collect();
    fs::write(
        at("model.safetensors.index.json"),
        format!(r#"{{"weight_map":{{{}}}}}"#, map.join(",")),
    )
    .unwrap();
    drop(Writer::create(folder.path(), &limit(100)).unwrap());
    assert_eq!(
        [1, 2, 3].map(|n| at(&hidden(n)).exists()),
        [false, true, false]
    );
    assert_eq!(
        content(&Checkpoint::open(folder.path()).unwrap()),
        content_of(&model(1))
    );
    // The next save tidies that, too.
    save(&refs(&model(2)), folder.path(), &quick()).unwrap();
    assert_eq!(
        names(folder.path()),
        [
            ".other.safetensors.1.0123456789abcdef.safetensors",
            "model.safetensors"
        ]
    );
    assert_eq!(
        content(&Checkpoint::open(folder.path()).unwrap()),
        content_of(&model(2))
    );
}

#[test]
fn saves_at_the_same_time_leave_one_of_them_whole() {
    let folder = tempfile::tempdir().unwrap();
    for round in 0..10 {
        std::thread::scope(|scope| {
            for seed in 0..4_u64 {
                let path = folder.path();
                scope.spawn(move || {
                    save(
                        &refs(&model(round * 10 + seed)),
                        path,
                        &limit(2100 + seed * 700),
                    )
                    .unwrap()
                });
            }
        });
        let found = content(&Checkpoint::open(folder.path()).unwrap());
        assert!((0..4).any(|seed| found == content_of(&model(round * 10 + seed))));
        assert!(
            names(folder.path())
                .iter()
                .all(|name| !name.starts_with('.')),
            "{:?}",
            names(folder.path())
        );
    }
}
