//! A disk that is full, a file that may not grow, a target that may not be written: the old checkpoint
//! stays, nothing is left behind, and the error says what happened.

mod common;

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{content, content_of, model, names, refs};
use tonnage::{Checkpoint, Dtype, Save, Writer, save};

fn large(seed: u64) -> Vec<common::Tensor> {
    (0..4)
        .map(|i| common::Tensor::new(&format!("t{i}"), Dtype::F32, &[256, 1024], seed + i))
        .collect()
}

/// Saves in every way there is; gives the errors.
fn each_way(folder: &Path) -> Vec<tonnage::Error> {
    let tensors = large(1);
    let sharded = Save {
        max_shard_size: Some(1 << 20),
        ..Save::default()
    };
    let stream = |options: &Save<'static>| -> tonnage::Result<()> {
        let mut writer = Writer::create(folder, options)?;
        refs(&tensors)
            .iter()
            .try_for_each(|tensor| writer.add(tensor))?;
        writer.finish().map(drop)
    };
    vec![
        save(&refs(&tensors), folder, &Save::default()).map(drop),
        save(&refs(&tensors), folder, &sharded).map(drop),
        save(
            &refs(&tensors),
            folder.join("model.safetensors"),
            &Save::default(),
        )
        .map(drop),
        stream(&Save::default()),
        stream(&sharded),
    ]
    .into_iter()
    .map(Result::unwrap_err)
    .collect()
}

fn old_is_whole(folder: &Path, before: &[String]) {
    assert_eq!(names(folder), before);
    assert_eq!(
        content(&Checkpoint::open(folder).unwrap()),
        content_of(&model(7))
    );
}

/// A small file system of its own; needs root.
struct Small(PathBuf);

impl Small {
    fn mount(at: &Path) -> Option<Small> {
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=2m", "tonnage-test"])
            .arg(at)
            .output();
        mounted
            .is_ok_and(|output| output.status.success())
            .then(|| Small(at.to_owned()))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).output();
    }
}

#[test]
fn a_full_disk_leaves_the_old_checkpoint() {
    let top = tempfile::tempdir().unwrap();
    let Some(disk) = Small::mount(top.path()) else {
        eprintln!(
            "not run: only root may mount a small disk; the file size limit is tested instead"
        );
        return;
    };
    for max_shard_size in [None, Some(4000)] {
        let folder = disk.0.join(format!("{max_shard_size:?}"));
        save(
            &refs(&model(7)),
            &folder,
            &Save {
                max_shard_size,
                ..Save::default()
            },
        )
        .unwrap();
        let before = names(&folder);
        for error in each_way(&folder) {
            assert_eq!(
                error.io().map(std::io::Error::kind),
                Some(ErrorKind::StorageFull),
                "{error}"
            );
            assert!(
                error.to_string().contains("No space left on device"),
                "{error}"
            );
            assert!(error.file().unwrap().contains("model"), "{error}");
            old_is_whole(&folder, &before);
        }
    }
}

const CHILD: &str = "TONNAGE_LIMIT_CHILD";

#[test]
#[ignore = "is run by `a_file_size_limit_leaves_the_old_checkpoint` in a process of its own"]
fn limited_child() {
    let Some(folder) = std::env::var_os(CHILD) else {
        return;
    };
    let folder = Path::new(&folder);
    let limit = rustix::process::Rlimit {
        current: Some(512 << 10),
        maximum: Some(512 << 10),
    };
    rustix::process::setrlimit(rustix::process::Resource::Fsize, limit).unwrap();
    let before = names(folder);
    for error in each_way(folder) {
        assert_eq!(
            error.io().map(std::io::Error::kind),
            Some(ErrorKind::FileTooLarge),
            "{error}"
        );
        old_is_whole(folder, &before);
    }
}

#[test]
fn a_file_size_limit_leaves_the_old_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    save(
        &refs(&model(7)),
        folder.path(),
        &Save {
            max_shard_size: Some(4000),
            ..Save::default()
        },
    )
    .unwrap();
    // The signal that comes with the limit would end the process before the error does.
    let child = Command::new("sh")
        .args([
            "-c",
            "trap '' XFSZ; exec \"$0\" --ignored --exact limited_child --test-threads=1",
        ])
        .arg(std::env::current_exe().unwrap())
        .env(CHILD, folder.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(
        child.status.success() && said.contains("1 passed"),
        "{said}{}",
        String::from_utf8_lossy(&child.stderr)
    );
}

#[test]
fn a_target_that_may_not_be_written_leaves_the_old_checkpoint() {
    let top = tempfile::tempdir().unwrap();
    let folder = top.path().join("model");
    save(&refs(&model(7)), &folder, &Save::default()).unwrap();
    let before = names(&folder);
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o555)).unwrap();
    if rustix::process::geteuid().is_root() {
        // Permissions do not bind root; a file system mounted read-only does.
        let bound = Command::new("mount")
            .args(["--bind", "-o", "ro"])
            .arg(&folder)
            .arg(&folder)
            .status();
        if !bound.is_ok_and(|status| status.success()) {
            eprintln!("not run: root without the right to mount");
            return;
        }
        let _mount = Small(folder.clone());
        for error in each_way(&folder) {
            assert_eq!(
                error.io().map(std::io::Error::kind),
                Some(ErrorKind::ReadOnlyFilesystem),
                "{error}"
            );
            old_is_whole(&folder, &before);
        }
    } else {
        for error in each_way(&folder) {
            assert_eq!(
                error.io().map(std::io::Error::kind),
                Some(ErrorKind::PermissionDenied),
                "{error}"
            );
            old_is_whole(&folder, &before);
        }
    }
}
