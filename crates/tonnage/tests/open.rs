//! What a path stands for, and what is refused, by name.

mod common;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;

use common::{Tensor, content, content_of, model, names, refs};
use tonnage::storage::MemorySource;
use tonnage::{Checkpoint, Dtype, ErrorKind, Layout, OpenOptions, Save, save, to_bytes};

fn sharded(folder: &Path) {
    save(
        &refs(&model(1)),
        folder,
        &Save {
            max_shard_size: Some(3000),
            ..Save::default()
        },
    )
    .unwrap();
}

fn write(path: &Path, tensors: &[Tensor]) {
    fs::write(path, to_bytes(&refs(tensors), &Save::default()).unwrap()).unwrap();
}

fn refusal(path: &Path) -> tonnage::Error {
    Checkpoint::open(path).unwrap_err()
}

#[test]
fn every_kind_of_path_opens_the_same_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    sharded(&at("many"));
    save(&refs(&model(1)), at("one"), &Save::default()).unwrap();
    let mut files: Vec<_> = names(&at("many"))
        .iter()
        .map(|name| at("many").join(name))
        .collect();
    let index = files.pop().unwrap();
    let bytes = fs::read(at("one/model.safetensors")).unwrap();
    let default = OpenOptions::default();
    let source = MemorySource::new(bytes.clone(), "<source>");
    let opened = [
        (Checkpoint::open(at("many")).unwrap(), Layout::Indexed),
        (Checkpoint::open(&index).unwrap(), Layout::Indexed),
        (
            Checkpoint::open_files(&files, &default).unwrap(),
            Layout::FileSet,
        ),
        (Checkpoint::open(at("one")).unwrap(), Layout::Single),
        (
            Checkpoint::open(at("one/model.safetensors")).unwrap(),
            Layout::Single,
        ),
        (
            Checkpoint::from_bytes(bytes, "<bytes>", &default).unwrap(),
            Layout::Bytes,
        ),
        (
            Checkpoint::from_sources(vec![Arc::new(source)], &default).unwrap(),
            Layout::Bytes,
        ),
    ];
    for (checkpoint, layout) in &opened {
        assert_eq!(checkpoint.layout(), *layout);
        assert_eq!(content(checkpoint), content_of(&model(1)));
        assert_eq!((checkpoint.len(), checkpoint.is_empty()), (8, false));
        assert_eq!(
            checkpoint.total_bytes(),
            model(1).iter().map(|t| t.data.len() as u64).sum::<u64>()
        );
        assert!(checkpoint.notes().is_empty());
    }
    fs::remove_file(&index).unwrap();
    let set = Checkpoint::open(at("many")).unwrap();
    assert_eq!(
        (set.layout(), content(&set)),
        (Layout::FileSet, content_of(&model(1)))
    );
    assert_eq!(set.root(), Some(&*at("many")));
}

#[test]
fn a_tensor_says_what_it_is_and_an_unknown_name_what_was_meant() {
    let folder = tempfile::tempdir().unwrap();
    sharded(folder.path());
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let tensor = checkpoint.tensor("layers.0.up").unwrap();
    assert_eq!(
        (tensor.name(), tensor.dtype().unwrap(), tensor.dtype_name()),
        ("layers.0.up", Dtype::BF16, "BF16")
    );
    assert_eq!(
        (tensor.shape(), tensor.byte_len(), tensor.elements()),
        (&[16, 64][..], 2048, 1024)
    );
    assert_eq!(checkpoint.at(tensor.index()).unwrap().name(), tensor.name());
    let file = &checkpoint.files()[tensor.file()];
    assert_eq!(tensor.file_label(), file.label);
    assert!(tensor.offset() >= file.data_start && tensor.offset() + tensor.byte_len() <= file.len);
    let mut part = [0; 10];
    tensor.read_at(2038, &mut part).unwrap();
    assert_eq!(part[..], tensor.read().unwrap()[2038..]);
    assert_eq!(
        tensor.read_at(2039, &mut part).unwrap_err().code(),
        "BUFFER_SIZE"
    );
    assert_eq!(
        tensor.read_at(u64::MAX, &mut part).unwrap_err().code(),
        "BUFFER_SIZE"
    );
    assert_eq!(
        checkpoint.read_into("scale", &mut part).unwrap_err().code(),
        "BUFFER_SIZE"
    );

    let error = checkpoint.tensor("layers.0.upp").unwrap_err();
    assert_eq!(
        (error.kind(), error.code(), error.tensor()),
        (ErrorKind::Usage, "UNKNOWN_TENSOR", Some("layers.0.upp"))
    );
    assert_eq!(error.suggestions()[0], "layers.0.up");
    assert!(checkpoint.get("absent").is_none() && checkpoint.at(99).is_none());
    let mut sorted: Vec<&str> = checkpoint.names().collect();
    sorted.sort_unstable();
    assert_eq!(
        checkpoint
            .iter_by_name()
            .map(|t| t.name())
            .collect::<Vec<_>>(),
        sorted
    );
}

#[test]
fn what_the_system_says_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    for (path, kind) in [
        (folder.path().join("absent"), std::io::ErrorKind::NotFound),
        (folder.path().to_owned(), std::io::ErrorKind::NotFound),
        ("/dev/null".into(), std::io::ErrorKind::InvalidInput),
    ] {
        let error = refusal(&path);
        assert_eq!(
            (error.kind(), error.io().unwrap().kind()),
            (ErrorKind::Io, kind),
            "{error}"
        );
        assert!(error.to_string().contains(path.to_str().unwrap()));
    }
}

#[test]
fn a_folder_that_is_no_one_checkpoint_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    sharded(root);
    let shards: Vec<String> = names(root);
    let index = root.join("model.safetensors.index.json");
    fs::copy(&index, root.join("other.safetensors.index.json")).unwrap();
    let error = refusal(root);
    assert_eq!(error.code(), "AMBIGUOUS");
    assert!(
        error.to_string().contains("model.safetensors.index.json")
            && error.to_string().contains("other.")
    );
    fs::remove_file(root.join("other.safetensors.index.json")).unwrap();
    fs::remove_file(&index).unwrap();

    fs::remove_file(root.join(&shards[1])).unwrap();
    let error = refusal(root);
    assert_eq!(
        (error.code(), error.needed()),
        ("INDEX_SHARD_MISSING", &*shards[1])
    );
    assert!(error.to_string().contains(&shards[1]), "{error}");

    // Two files of one numbered set hold the same tensor.
    fs::copy(root.join(&shards[0]), root.join(&shards[1])).unwrap();
    let error = refusal(root);
    assert_eq!(error.code(), "INDEX_TENSOR_TWICE");
    assert!(
        error.to_string().contains(&shards[0]) && error.to_string().contains(&shards[1]),
        "{error}"
    );

    write(&root.join("single.safetensors"), &model(2));
    assert_eq!(refusal(root).code(), "AMBIGUOUS");
    // Hidden files are nobody's checkpoint.
    let hidden = tempfile::tempdir().unwrap();
    write(
        &hidden
            .path()
            .join(".model.safetensors.1.0123456789abcdef.safetensors"),
        &model(2),
    );
    assert_eq!(refusal(hidden.path()).kind(), ErrorKind::Io);
}

#[test]
fn an_index_that_does_not_fit_its_files_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("model");
    fs::create_dir(&root).unwrap();
    write(&root.join("a.safetensors"), &model(1));
    write(&folder.path().join("secret.safetensors"), &model(1));
    symlink("../secret.safetensors", root.join("link.safetensors")).unwrap();
    fs::create_dir(root.join("folder.safetensors")).unwrap();
    let index = |text: String| {
        fs::write(root.join("model.safetensors.index.json"), text).unwrap();
        Checkpoint::open(&root)
    };
    let map = |name: &str, file: &str| index(format!(r#"{{"weight_map":{{"{name}":"{file}"}}}}"#));
    for (name, file, code) in [
        ("scale", "absent.safetensors", "INDEX_FILE_MISSING"),
        ("scale", "link.safetensors", "INDEX_ESCAPES"),
        ("scale", "folder.safetensors", "INDEX_NOT_REGULAR"),
        ("scale", "../secret.safetensors", "INDEX_PATH"),
        ("scale", "/etc/passwd.safetensors", "INDEX_PATH"),
        ("absent", "a.safetensors", "INDEX_TENSOR_MISSING"),
        ("scale", "a.bin", "INDEX_EXTENSION"),
    ] {
        let error = map(name, file).unwrap_err();
        assert_eq!(
            (error.code(), error.kind()),
            (code, ErrorKind::Format),
            "{error}"
        );
        assert!(error.clause().unwrap().starts_with("8."));
        assert!(error.file().is_some());
    }
    let trusted = OpenOptions {
        allow_symlinks: true,
        ..OpenOptions::default()
    };
    map("scale", "link.safetensors").unwrap_err();
    assert_eq!(Checkpoint::open_with(&root, &trusted).unwrap().len(), 1);

    let notes = |result: tonnage::Result<Checkpoint>| -> Vec<&'static str> {
        result
            .unwrap()
            .notes()
            .iter()
            .map(|note| note.code)
            .collect()
    };
    assert_eq!(
        notes(map("scale", "a.safetensors")),
        ["INDEX_EXTRA_TENSORS"]
    );
    let text = r#"{"metadata":{"total_size":9},"weight_map":{"scale":"a.safetensors"}}"#;
    assert_eq!(
        notes(index(text.to_owned())),
        ["INDEX_EXTRA_TENSORS", "INDEX_TOTAL_SIZE"]
    );
    let limits = tonnage::format::Limits {
        index_bytes: 10,
        ..Default::default()
    };
    let read = tonnage::format::ReadOptions {
        limits,
        ..Default::default()
    };
    let error = Checkpoint::open_with(
        &root,
        &OpenOptions {
            read,
            ..OpenOptions::default()
        },
    )
    .unwrap_err();
    assert_eq!(
        (error.code(), error.kind()),
        ("LIMIT_INDEX", ErrorKind::Limit)
    );
}

#[test]
fn metadata_of_many_files_is_merged_and_disagreement_noted() {
    let folder = tempfile::tempdir().unwrap();
    let one = |name: &str, tensor: &str, who: &str| {
        let metadata = vec![
            ("format".to_owned(), "pt".to_owned()),
            ("who".to_owned(), who.to_owned()),
        ];
        let tensors = [Tensor::new(tensor, Dtype::U8, &[4], 1)];
        let bytes = to_bytes(
            &refs(&tensors),
            &Save {
                metadata,
                ..Save::default()
            },
        )
        .unwrap();
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    let paths = [
        one("a.safetensors", "a", "first"),
        one("b.safetensors", "b", "second"),
    ];
    let checkpoint = Checkpoint::open_files(&paths, &OpenOptions::default()).unwrap();
    assert_eq!(checkpoint.metadata()["who"], "first");
    assert_eq!(checkpoint.metadata()["format"], "pt");
    assert_eq!(
        checkpoint
            .notes()
            .iter()
            .map(|n| n.code)
            .collect::<Vec<_>>(),
        ["METADATA_DIFFERS"]
    );
    assert_eq!(checkpoint.files()[1].metadata.as_ref().unwrap().len(), 2);
}

#[test]
fn a_header_larger_than_the_first_read_is_read_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("many.safetensors");
    let tensors: Vec<Tensor> = (0..5000)
        .map(|i| Tensor::new(&format!("t.{i:06}"), Dtype::U8, &[3], i))
        .collect();
    write(&path, &tensors);
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert!(checkpoint.files()[0].data_start > 64 << 10);
    assert_eq!(content(&checkpoint), content_of(&tensors));
}
