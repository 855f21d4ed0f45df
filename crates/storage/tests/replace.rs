//! A file is replaced whole or not at all, and keeps what it had: mode, links, neighbours.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use tonnage_storage::{AtomicFile, AtomicOptions, Durability, Sink, lock_folder, sync_dir};

fn replace(
    path: &Path,
    content: &[u8],
    durability: Durability,
) -> Result<(), tonnage_storage::Error> {
    let file = AtomicFile::create(
        path,
        &AtomicOptions {
            durability,
            ..Default::default()
        },
    )?;
    file.reserve(content.len() as u64)?;
    file.write_all_at(0, content)?;
    file.start_writeback(0, content.len() as u64);
    file.commit()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn a_new_file_has_the_mode_of_any_new_file_and_an_old_one_keeps_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let (ours, plain) = (folder.path().join("ours"), folder.path().join("plain"));
    fs::write(&plain, b"").unwrap();
    for durability in [Durability::None, Durability::File, Durability::Full] {
        replace(&ours, b"content", durability).unwrap();
        assert_eq!(
            (fs::read(&ours).unwrap(), mode(&ours)),
            (b"content".to_vec(), mode(&plain))
        );
    }
    for wanted in [0o640, 0o755, 0o600] {
        fs::set_permissions(&ours, fs::Permissions::from_mode(wanted)).unwrap();
        replace(&ours, b"again", Durability::None).unwrap();
        assert_eq!(mode(&ours), wanted);
    }
    assert_eq!(names(folder.path()), ["ours", "plain"]);
}

#[test]
fn the_file_behind_a_link_is_replaced_or_the_link_if_asked() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("real")).unwrap();
    fs::write(at("real/file"), b"old").unwrap();
    symlink("real/file", at("one")).unwrap();
    symlink("one", at("two")).unwrap();
    symlink("real/absent", at("dangling")).unwrap();
    replace(&at("two"), b"new", Durability::Full).unwrap();
    assert_eq!(fs::read(at("real/file")).unwrap(), b"new");
    assert!(at("two").is_symlink() && at("one").is_symlink());
    replace(&at("dangling"), b"made", Durability::None).unwrap();
    assert_eq!(fs::read(at("real/absent")).unwrap(), b"made");
    symlink("loop", at("loop")).unwrap();
    assert!(replace(&at("loop"), b"", Durability::None).is_err());

    let options = AtomicOptions {
        replace_link: true,
        ..Default::default()
    };
    let file = AtomicFile::create(at("two"), &options).unwrap();
    file.write_all_at(0, b"own").unwrap();
    file.commit().unwrap();
    assert!(!at("two").is_symlink());
    assert_eq!(fs::read(at("real/file")).unwrap(), b"new");
}

#[test]
fn a_drop_and_an_error_leave_the_old_file_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    fs::write(&path, b"old").unwrap();
    let file = AtomicFile::create(&path, &AtomicOptions::default()).unwrap();
    file.write_all_at(0, b"half").unwrap();
    assert_eq!(names(folder.path()).len(), 2);
    assert!(file.write_all_at(u64::MAX, b"x").is_err());
    drop(file);
    assert_eq!(
        (fs::read(&path).unwrap(), names(folder.path())),
        (b"old".to_vec(), vec!["file".to_owned()])
    );

    let staged = AtomicFile::create(&path, &AtomicOptions::default())
        .unwrap()
        .stage()
        .unwrap();
    // The name is taken by a folder meanwhile: the rename fails and cleans up.
    fs::remove_file(&path).unwrap();
    fs::create_dir_all(path.join("x")).unwrap();
    assert_eq!(staged.target(), path);
    assert!(staged.path().exists());
    let error = staged.commit().unwrap_err();
    assert_eq!(error.doing(), "replace");
    assert_eq!(names(folder.path()), ["file"]);
}

#[test]
fn what_cannot_be_replaced_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let kind = |path: &Path| replace(path, b"", Durability::None).unwrap_err().kind();
    assert_eq!(kind(folder.path()), ErrorKind::IsADirectory);
    assert_eq!(
        kind(&folder.path().join("absent/file")),
        ErrorKind::NotFound
    );
    assert_eq!(kind(Path::new("/dev/null")), ErrorKind::InvalidInput);
    assert!(matches!(
        kind(Path::new("/proc/file")),
        ErrorKind::NotFound | ErrorKind::PermissionDenied
    ));
    assert!(sync_dir(&folder.path().join("absent")).is_err());
}

#[test]
fn a_file_protected_from_writing_is_not_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    fs::write(&path, b"old").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).unwrap();
    // Root may write everywhere, so there is nothing to refuse.
    let root = rustix::process::geteuid().is_root();
    match replace(&path, b"new", Durability::None) {
        Ok(()) => assert!(root && fs::read(&path).unwrap() == b"new"),
        Err(e) => assert!(
            !root && e.kind() == ErrorKind::PermissionDenied && fs::read(&path).unwrap() == b"old"
        ),
    }
}

#[test]
fn a_staged_file_can_be_given_another_name_and_takes_over_its_mode() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("first"), folder.path().join("second"));
    fs::write(&second, b"old").unwrap();
    fs::set_permissions(&second, fs::Permissions::from_mode(0o640)).unwrap();
    let options = AtomicOptions {
        suffix: "part".to_owned(),
        ..Default::default()
    };
    let file = AtomicFile::create(&first, &options).unwrap();
    file.write_all_at(0, b"new").unwrap();
    let mut staged = file.stage().unwrap();
    assert!(staged.path().to_str().unwrap().ends_with(".part"));
    assert_eq!(
        staged.retarget(folder.path()).unwrap_err().kind(),
        ErrorKind::IsADirectory
    );
    staged.retarget(&second).unwrap();
    staged.commit().unwrap();
    assert_eq!(
        (fs::read(&second).unwrap(), mode(&second)),
        (b"new".to_vec(), 0o640)
    );
    assert_eq!(names(folder.path()), ["second"]);

    let kept = AtomicFile::create(&first, &options)
        .unwrap()
        .stage()
        .unwrap()
        .keep();
    assert!(kept.exists());
}

#[test]
fn a_folder_is_locked_until_the_lock_is_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let lock = lock_folder(folder.path()).unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    let path = folder.path().to_owned();
    let other = std::thread::spawn(move || {
        let _lock = lock_folder(&path).unwrap();
        sender.send(()).unwrap();
    });
    assert!(
        receiver
            .recv_timeout(std::time::Duration::from_millis(100))
            .is_err()
    );
    drop(lock);
    receiver.recv().unwrap();
    other.join().unwrap();
    assert_eq!(
        lock_folder(&folder.path().join("absent"))
            .unwrap_err()
            .kind(),
        ErrorKind::NotFound
    );
}
