use super::*;

const NEVER: &dyn Fn() -> bool = &|| false;

fn patience(millis: u64) -> Patience<'static> {
    Patience {
        timeout: Duration::from_millis(millis),
        cancelled: NEVER,
    }
}

fn agreed(members: u32) -> Agreed {
    Agreed {
        members,
        half: 10_000,
        digest: [7; 32],
    }
}

fn folder() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("window");
    (folder, path)
}

#[test]
fn what_each_writes_all_read_for_many_turns() {
    let (_folder, path) = folder();
    const MEMBERS: u64 = 3;
    std::thread::scope(|scope| {
        for member in 0..MEMBERS {
            let path = &path;
            scope.spawn(move || {
                let patience = patience(20_000);
                let joined = Window::join(path, agreed(MEMBERS as u32), member as u32, &patience);
                let mut window = joined.unwrap();
                for turn in 0..200 {
                    let value = |member: u64| (turn * MEMBERS + member) as u8;
                    for part in window
                        .parts(turn, &[(member * 3000, 1000), (member * 3000 + 1500, 500)])
                        .unwrap()
                    {
                        part.fill(value(member));
                    }
                    window.arrive(&patience).unwrap();
                    for other in 0..MEMBERS {
                        let begin = other as usize * 3000;
                        let part = &window.bytes(turn)[begin..begin + 2000];
                        assert!(
                            part[..1000]
                                .iter()
                                .chain(&part[1500..])
                                .all(|&byte| byte == value(other))
                        );
                    }
                }
                window.finish();
            });
        }
    });
    assert!(!path.exists());
}

#[test]
fn who_comes_alone_waits_no_longer_than_it_was_told() {
    let (_folder, path) = folder();
    for member in [0, 1] {
        let error = Window::join(&path, agreed(2), member, &patience(60)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
        assert!(!path.exists());
    }
    let stop = Patience {
        timeout: Duration::from_secs(60),
        cancelled: &|| true,
    };
    let error = Window::join(&path, agreed(2), 1, &stop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Interrupted);
    let error = Window::join(&path, agreed(2), 2, &patience(60)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
}

fn pair(path: &Path, second: Agreed) -> (Result<Window, Error>, Result<Window, Error>) {
    std::thread::scope(|scope| {
        let other = scope.spawn(move || Window::join(path, second, 1, &patience(20_000)));
        let one = Window::join(path, agreed(2), 0, &patience(20_000));
        (one, other.join().unwrap())
    })
}

#[test]
fn other_plans_are_told_on_both_sides() {
    let (_folder, path) = folder();
    let digest = [8; 32];
    for second in [
        Agreed {
            digest,
            ..agreed(2)
        },
        Agreed {
            half: 20_000,
            ..agreed(2)
        },
        agreed(3),
    ] {
        let (one, two) = pair(&path, second);
        assert_eq!(two.unwrap_err().kind(), ErrorKind::InvalidData);
        let error = one.unwrap_err();
        assert!(error.to_string().contains("has another plan"), "{error}");
        assert!(!path.exists());
    }
}

#[test]
fn the_others_hear_of_one_that_ends_early() {
    let (_folder, path) = folder();
    let (one, two) = pair(&path, agreed(2));
    let mut one = one.unwrap();
    drop(two.unwrap());
    let error = one.arrive(&patience(20_000)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionAborted, "{error}");
    // Who ends after its last turn is not missed.
    let (one, two) = pair(&path, agreed(2));
    let (mut one, mut two) = (one.unwrap(), two.unwrap());
    std::thread::scope(|scope| {
        scope.spawn(move || {
            two.arrive(&patience(20_000)).unwrap();
            two.finish();
        });
        one.arrive(&patience(20_000)).unwrap();
    });
}

#[test]
#[cfg(target_os = "linux")]
fn a_death_is_noticed_by_its_lock_long_before_the_time_is_over() {
    let (_folder, path) = folder();
    let (one, two) = pair(&path, agreed(2));
    let mut one = one.unwrap();
    let mut two = two.unwrap();
    // As a process that is killed: nothing is said, the file is closed.
    two.finished = true;
    drop(two);
    let began = Instant::now();
    let error = one.arrive(&patience(60_000)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionAborted, "{error}");
    assert!(error.to_string().contains("died"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(20));
}

#[test]
#[cfg(target_os = "linux")]
fn a_name_left_behind_is_taken_over_and_one_in_use_is_not() {
    let (_folder, path) = folder();
    std::fs::write(&path, vec![0; 50_000]).unwrap();
    let (one, two) = pair(&path, agreed(2));
    drop((one.unwrap(), two.unwrap()));
    let used = create(&path).unwrap();
    lock(&used, 0).unwrap();
    let error = Window::join(&path, agreed(2), 0, &patience(60)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    assert!(path.exists());
}

#[test]
#[cfg(target_os = "linux")]
fn what_other_groups_left_is_removed_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let name = |n: u32| folder.path().join(format!("tonnage-{n:032x}"));
    let long_ago = std::time::SystemTime::now() - 2 * OLD;
    // Left long ago; in use; begun just now; another's name.
    let other = folder.path().join("tonnage-notes.txt");
    let made: Vec<File> = [name(1), name(2), name(3), other.clone()]
        .iter()
        .map(|path| create(path).unwrap())
        .collect();
    lock(&made[1], 0).unwrap();
    for at in [0, 1, 3] {
        made[at].set_modified(long_ago).unwrap();
    }
    drop(Window::join(name(4), agreed(1), 0, &patience(60)).unwrap());
    let left = [name(1), name(2), name(3), other].map(|path| path.exists());
    assert_eq!(left, [false, true, true, true]);
}

#[test]
fn parts_stay_in_their_half() {
    let (_folder, path) = folder();
    let mut window = Window::join(&path, agreed(1), 0, &patience(60)).unwrap();
    for parts in [
        &[(0, 10_001)][..],
        &[(0, 10), (9, 1)],
        &[(u64::MAX, 2)],
        &[(10, 1), (0, 1)],
    ] {
        let error = window.parts(1, parts).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
    assert_eq!(window.parts(1, &[(0, 0), (0, 10_000)]).unwrap().len(), 2);
    window.parts(0, &[(0, 10_000)]).unwrap()[0].fill(1);
    assert!(window.bytes(1).iter().all(|&byte| byte == 0));
    assert_eq!(
        window
            .bytes(2)
            .iter()
            .map(|&byte| usize::from(byte))
            .sum::<usize>(),
        10_000
    );
}
