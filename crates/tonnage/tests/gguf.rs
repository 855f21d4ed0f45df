//! Claim: a GGUF file is a checkpoint like any other, whatever its byte order and in how many files it is, and
//! comes back byte for byte from the safetensors that it was converted to.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::noise;
use tonnage::gguf::{
    ByteOrder, GgmlType, GgufContent, GgufItem, GgufSave, OwnedValue, WriteOptions, convert,
    save_gguf,
};
use tonnage::{Checkpoint, Dtype, ErrorKind, Load, OpenOptions, Save, Slice, verify};

struct Tensor {
    name: String,
    ty: GgmlType,
    shape: Vec<u64>,
    data: Vec<u8>,
}

fn tensor(name: &str, ty: GgmlType, shape: &[u64]) -> Tensor {
    let elements: u64 = shape.iter().product();
    let len = elements as usize / ty.elements() * ty.bytes();
    let data = noise(len, name.len() as u64 + len as u64);
    Tensor {
        name: name.to_owned(),
        ty,
        shape: shape.to_vec(),
        data,
    }
}

fn model() -> Vec<Tensor> {
    vec![
        tensor("token_embd.weight", GgmlType::Q8_0, &[40, 64]),
        tensor("blk.0.attn_q.weight", GgmlType::Q4_K, &[24, 512]),
        tensor("blk.1.attn_q.weight", GgmlType::Q4_K, &[24, 512]),
        tensor("blk.0.ffn_up_exps.weight", GgmlType::Q6_K, &[3, 5, 256]),
        tensor("blk.0.attn_norm.weight", GgmlType::F32, &[7]),
        tensor("half", GgmlType::BF16, &[3, 5]),
        tensor("scalar", GgmlType::F64, &[]),
        tensor("empty", GgmlType::F16, &[0, 4]),
        tensor("ids", GgmlType::I64, &[9]),
    ]
}

fn kv(more: &[(&str, OwnedValue)]) -> Vec<(String, OwnedValue)> {
    let mut kv = vec![
        (
            "general.architecture".to_owned(),
            OwnedValue::String(b"llama".to_vec()),
        ),
        ("general.alignment".to_owned(), OwnedValue::U32(64)),
        ("llama.rope.freq_base".to_owned(), OwnedValue::F32(1e6)),
    ];
    kv.extend(
        more.iter()
            .map(|(key, value)| ((*key).to_owned(), value.clone())),
    );
    kv
}

fn write(path: &Path, tensors: &[Tensor], more: &[(&str, OwnedValue)], order: ByteOrder) {
    let items: Vec<GgufItem<'_>> = tensors
        .iter()
        .map(|t| GgufItem {
            name: &t.name,
            ty: t.ty,
            shape: &t.shape,
            content: GgufContent::Bytes(&t.data),
        })
        .collect();
    let save = GgufSave {
        write: WriteOptions { order, version: 3 },
        ..GgufSave::default()
    };
    save_gguf(&kv(more), &items, path, &save).unwrap();
}

fn check(checkpoint: &Checkpoint, tensors: &[Tensor]) {
    assert_eq!(checkpoint.len(), tensors.len());
    for tensor in tensors {
        let found = checkpoint.tensor(&tensor.name).unwrap();
        let said = checkpoint.gguf().unwrap().get(&tensor.name).unwrap();
        assert_eq!(
            (said.ty, said.logical_shape),
            (tensor.ty, &tensor.shape[..])
        );
        assert_eq!(found.dtype().unwrap(), said.dtype());
        assert_eq!(found.shape(), said.stored_shape());
        assert!(found.read().unwrap() == tensor.data, "{}", tensor.name);
    }
    let loaded = checkpoint.load(&Load::default()).unwrap();
    for tensor in tensors {
        assert!(
            loaded.get(&tensor.name).unwrap().1 == tensor.data,
            "{}",
            tensor.name
        );
    }
}

#[test]
fn a_file_opens_and_its_tensors_are_as_they_were_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let tensors = model();
    for order in [ByteOrder::Little, ByteOrder::Big] {
        write(&path, &tensors, &[], order);
        for checkpoint in [
            Checkpoint::open(&path).unwrap(),
            Checkpoint::open(folder.path()).unwrap(),
            Checkpoint::from_bytes(fs::read(&path).unwrap(), "<bytes>", &OpenOptions::default())
                .unwrap(),
        ] {
            check(&checkpoint, &tensors);
            assert_eq!(checkpoint.gguf().unwrap().files()[0].byte_order(), order);
            assert_eq!(checkpoint.metadata()["general.architecture"], "llama");
            assert!(
                checkpoint.metadata()["quant.map"]
                    .contains(r#"{"m":"blk.{}.attn_q.weight","s":"q4_k"}"#)
            );
        }
        let checkpoint = Checkpoint::open(&path).unwrap();
        assert_eq!(
            checkpoint.tensor("blk.0.attn_q.weight").unwrap().shape(),
            [24, 288]
        );
        // Two rows, one block of each: what a shard of tensor parallelism is made of.
        let slice = checkpoint.tensor("blk.1.attn_q.weight").unwrap();
        let slice = slice.slice(&[
            Slice {
                start: 3,
                stop: 5,
                step: 1,
            },
            Slice {
                start: 144,
                stop: 288,
                step: 1,
            },
        ]);
        let data = &tensors[2].data;
        assert_eq!(
            slice.unwrap().read().unwrap(),
            [&data[3 * 288 + 144..4 * 288], &data[4 * 288 + 144..5 * 288]].concat()
        );
        match order {
            ByteOrder::Little => {
                assert_eq!(checkpoint.view("half").unwrap(), tensors[5].data);
            }
            ByteOrder::Big => {
                // Pages of the file are in the other byte order: there is no view of them.
                assert_eq!(checkpoint.view("half").unwrap_err().kind(), ErrorKind::Io);
            }
        }
        let verdict = verify(&path, &OpenOptions::default()).unwrap();
        assert!(
            verdict.ok() && verdict.tensors() == tensors.len(),
            "{verdict:?}"
        );
    }
}

#[test]
fn to_safetensors_and_back_it_is_the_same_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    for order in [ByteOrder::Little, ByteOrder::Big] {
        write(&path("a.gguf"), &model(), &[], order);
        let before = fs::read(path("a.gguf")).unwrap();
        // As it is; with bytes between tensors and behind the last; without the padding behind the last.
        let mut dirty = before.clone();
        let opened = Checkpoint::open(path("a.gguf")).unwrap();
        let gap = opened.gguf().unwrap().get("half").unwrap();
        let end = (gap.offset + gap.len) as usize;
        dirty[end] = 7;
        dirty.extend(b"signature");
        let mut short = before.clone();
        short.truncate(before.len() - 40);
        for (bytes, padded) in [(before, false), (dirty, true), (short, false)] {
            fs::write(path("a.gguf"), &bytes).unwrap();
            let checkpoint = Checkpoint::open(path("a.gguf")).unwrap();
            convert(&checkpoint, path("b.safetensors"), &Save::default()).unwrap();
            let carried = Checkpoint::open(path("b.safetensors")).unwrap();
            assert_eq!(carried.get("gguf.padding").is_some(), padded);
            for tensor in model() {
                assert!(carried.read(&tensor.name).unwrap() == tensor.data);
            }
            assert_eq!(
                carried.tensor("half").unwrap().dtype().unwrap(),
                Dtype::BF16
            );
            convert(&carried, path("c.gguf"), &Save::default()).unwrap();
            assert!(fs::read(path("c.gguf")).unwrap() == bytes);
            // A copy is the same file, too.
            convert(&checkpoint, path("d.gguf"), &Save::default()).unwrap();
            assert!(fs::read(path("d.gguf")).unwrap() == bytes);
        }
    }
}

/// The model in three files, the first of which has the metadata.
fn split(folder: &Path, order: ByteOrder) -> Vec<PathBuf> {
    let mut tensors = model();
    let mut paths = Vec::new();
    for (no, take) in [4, 3, 2].into_iter().enumerate() {
        let part: Vec<Tensor> = tensors.drain(..take).collect();
        let path = folder.join(format!("m-{:05}-of-00003.gguf", no + 1));
        let place = [
            ("split.no", OwnedValue::U16(no as u16)),
            ("split.count", OwnedValue::U16(3)),
            ("split.tensors.count", OwnedValue::I32(9)),
        ];
        write(&path, &part, &place, order);
        paths.push(path);
    }
    paths
}

#[test]
fn a_split_model_is_one_checkpoint_and_comes_back_in_its_files() {
    let folder = tempfile::tempdir().unwrap();
    for order in [ByteOrder::Little, ByteOrder::Big] {
        let paths = split(folder.path(), order);
        for path in paths.iter().map(PathBuf::as_path).chain([folder.path()]) {
            check(&Checkpoint::open(path).unwrap(), &model());
        }
        assert!(verify(folder.path(), &OpenOptions::default()).unwrap().ok());
        let out = tempfile::tempdir().unwrap();
        let checkpoint = Checkpoint::open(&paths[0]).unwrap();
        let carried = out.path().join("m.safetensors");
        convert(&checkpoint, &carried, &Save::default()).unwrap();
        let carried = Checkpoint::open(carried).unwrap();
        let saved = convert(&carried, out.path().join("m.gguf"), &Save::default()).unwrap();
        assert_eq!(saved.files.len(), 3);
        for (before, after) in paths.iter().zip(&saved.files) {
            assert_eq!(before.file_name(), after.file_name());
            assert!(fs::read(before).unwrap() == fs::read(after).unwrap());
        }
        // Or they become one file.
        let one = out.path().join("one.gguf");
        convert(&checkpoint, &one, &Save::default()).unwrap();
        let one = Checkpoint::open(one).unwrap();
        check(&one, &model());
        assert_eq!(one.gguf().unwrap().value("split.count"), None);
    }
}

#[test]
fn split_models_that_are_not_whole_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let paths = split(folder.path(), ByteOrder::Little);
    let code = |path: &Path| Checkpoint::open(path).unwrap_err().code();
    let second = fs::read(&paths[1]).unwrap();
    fs::write(&paths[1], fs::read(&paths[2]).unwrap()).unwrap();
    assert_eq!(code(&paths[0]), "GGUF_SPLIT");
    assert!(!verify(folder.path(), &OpenOptions::default()).unwrap().ok());
    fs::remove_file(&paths[1]).unwrap();
    let error = Checkpoint::open(&paths[0]).unwrap_err();
    assert!(
        error.to_string().contains("m-00002-of-00003.gguf"),
        "{error}"
    );
    // One file of three, alone under another name, says that it is not alone.
    let alone = tempfile::tempdir().unwrap();
    let path = alone.path().join("alone.gguf");
    fs::write(&path, second).unwrap();
    assert_eq!(code(&path), "GGUF_SPLIT");
}

#[test]
fn what_is_carried_must_fit_what_lies_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    write(&path("a.gguf"), &model(), &[], ByteOrder::Little);
    convert(
        &Checkpoint::open(path("a.gguf")).unwrap(),
        path("a.safetensors"),
        &Save::default(),
    )
    .unwrap();
    let carried = Checkpoint::open(path("a.safetensors")).unwrap();
    let refused = |keep: &dyn Fn(&str) -> bool, cast: bool| {
        let items: Vec<tonnage::Item<'_>> = carried
            .iter()
            .filter(|t| keep(t.name()))
            .map(|t| tonnage::Item {
                name: t.name(),
                dtype: if cast && t.name() == "half" {
                    Dtype::F32
                } else {
                    t.dtype().unwrap()
                },
                shape: t.shape(),
                content: tonnage::Content::Stored(t),
            })
            .collect();
        let save = Save {
            metadata: carried.metadata().clone().into_iter().collect(),
            ..Save::default()
        };
        tonnage::save_items(&items, path("b.safetensors"), &save).unwrap();
        let error = convert(
            &Checkpoint::open(path("b.safetensors")).unwrap(),
            path("b.gguf"),
            &Save::default(),
        );
        let error = error.unwrap_err();
        assert!(!path("b.gguf").exists());
        assert_eq!(error.code(), "GGUF_CARRIED", "{error}");
        error.tensor().unwrap_or_default().to_owned()
    };
    assert_eq!(refused(&|name| name != "half", false), "half");
    assert_eq!(refused(&|name| name != "gguf.header", false), "gguf.header");
    assert_eq!(refused(&|_| true, true), "half");
    let plain = folder.path().join("plain.safetensors");
    tonnage::save(&[], &plain, &Save::default()).unwrap();
    let error = convert(
        &Checkpoint::open(plain).unwrap(),
        path("b.gguf"),
        &Save::default(),
    )
    .unwrap_err();
    assert_eq!(
        (error.code(), error.clause()),
        ("GGUF_NO_HEADER", Some("G9.4"))
    );
}

#[test]
fn refusals_name_file_tensor_found_needed_and_clause() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    write(&path, &model(), &[], ByteOrder::Little);
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 300]).unwrap();
    let error = Checkpoint::open(&path).unwrap_err();
    assert_eq!(
        (error.kind(), error.code(), error.clause()),
        (ErrorKind::Format, "GGUF_DATA_TRUNCATED", Some("G5.2"))
    );
    assert_eq!(error.file(), path.to_str());
    assert!(error.tensor().is_some() && !error.found().is_empty() && !error.needed().is_empty());
    let verdict = verify(&path, &OpenOptions::default()).unwrap();
    assert_eq!(verdict.findings[0].code, "GGUF_DATA_TRUNCATED");
    // What a file is called decides before what it begins with.
    let disguised = folder.path().join("m.safetensors");
    fs::write(&disguised, &bytes).unwrap();
    assert_eq!(
        Checkpoint::open(&disguised).unwrap_err().code(),
        "HEADER_TOO_LARGE"
    );
    fs::write(&path, &bytes).unwrap();
    let both = Checkpoint::open_files(&[&path, &path], &OpenOptions::default()).unwrap_err();
    assert_eq!(both.code(), "GGUF_SPLIT");
}
