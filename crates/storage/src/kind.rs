//! What lies behind a source, by the magic numbers of `statfs(2)`.

use std::fs::File;

/// What lies behind a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StorageKind {
    /// A disk of this machine.
    Local,
    /// A file system whose reads go over a network or through another process; its name.
    Network(&'static str),
    /// Bytes in memory: given as such, or a file in tmpfs.
    Memory,
    /// Somewhere else: an object store, a server, an object of another language.
    Remote,
}

/// Magic numbers from `linux/magic.h` and from the file systems' own sources. FUSE counts as network: what is
/// behind it is another process at best, and each call to it has a price.
#[cfg(target_os = "linux")]
const NETWORK: [(u32, &str); 15] = [
    (0x6969, "nfs"),
    (0xFF53_4D42, "cifs"),
    (0xFE53_4D42, "smb2"),
    (0x517B, "smb"),
    (0x6573_5546, "fuse"),
    (0x0BD0_0BD0, "lustre"),
    (0x00C3_6400, "ceph"),
    (0x0102_1997, "9p"),
    (0x5346_414F, "afs"),
    (0x6B41_4653, "kafs"),
    (0x7375_7245, "coda"),
    (0x0116_1970, "gfs2"),
    (0x7461_636F, "ocfs2"),
    (0x4750_4653, "gpfs"),
    (0x1983_0326, "beegfs"),
];

/// tmpfs, ramfs, hugetlbfs.
#[cfg(target_os = "linux")]
const MEMORY: [u32; 3] = [0x0102_1994, 0x8584_58F6, 0x9584_58F6];

/// The kind of a file system, by its magic number.
#[cfg(target_os = "linux")]
fn of_magic(magic: u32) -> StorageKind {
    if MEMORY.contains(&magic) {
        return StorageKind::Memory;
    }
    let network = NETWORK.iter().find(|(number, _)| *number == magic);
    network.map_or(StorageKind::Local, |(_, name)| StorageKind::Network(name))
}

/// What an open file lies on. What the system does not tell counts as a local disk.
#[cfg(target_os = "linux")]
pub(crate) fn of_file(file: &File) -> StorageKind {
    // The number has 32 bits; its type has more on some machines, and a sign on others.
    rustix::fs::fstatfs(file).map_or(StorageKind::Local, |stat| of_magic(stat.f_type as u32))
}

/// What an open file lies on, as far as the system tells.
#[cfg(target_vendor = "apple")]
pub(crate) fn of_file(file: &File) -> StorageKind {
    /// `MNT_LOCAL` of `sys/mount.h`.
    const LOCAL: u32 = 0x1000;
    match rustix::fs::fstatfs(file) {
        Ok(stat) if stat.f_flags & LOCAL == 0 => StorageKind::Network("network"),
        _ => StorageKind::Local,
    }
}

/// Nothing is known here.
#[cfg(not(any(target_os = "linux", target_vendor = "apple")))]
pub(crate) fn of_file(_: &File) -> StorageKind {
    StorageKind::Local
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn file_systems_are_told_apart_by_their_numbers() {
        assert_eq!(of_magic(0x6969), StorageKind::Network("nfs"));
        assert_eq!(of_magic(0x0BD0_0BD0), StorageKind::Network("lustre"));
        assert_eq!(of_magic(0x0102_1994), StorageKind::Memory);
        // ext4, XFS, overlayfs, and one that nobody knows.
        for magic in [0xEF53, 0x5846_5342, 0x794C_7630, 1] {
            assert_eq!(of_magic(magic), StorageKind::Local);
        }
        let mut numbers: Vec<u32> = NETWORK.iter().map(|(number, _)| *number).collect();
        numbers.extend(MEMORY);
        numbers.sort_unstable();
        assert!(numbers.windows(2).all(|pair| pair[0] != pair[1]));
    }
}
