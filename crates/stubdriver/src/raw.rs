//! The operations on raw memory, one function each.
//!
//! Invariants:
//! 1. An out-parameter or a text that a caller of the driver passes is null or valid, as the API demands.
//! 2. Addresses that [`copy`], [`fill`] and [`hash`] get were checked against a block that exists, and the
//!    block stays mapped while they run: devices' memory for good, page-locked memory until its copies are
//!    over, a caller's own memory because the caller waits.
//! 3. Maps are unmapped once, by whoever asked for them.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_void};

use crate::world::{Code, INVALID_VALUE};

/// Writes an out-parameter.
pub fn give<T>(to: *mut T, value: T) -> Result<(), Code> {
    if to.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: invariant 1; unaligned would be the caller's mistake, and is not undefined here.
    unsafe { to.write_unaligned(value) };
    Ok(())
}

/// Reads what a parameter points to.
pub fn take<T: Copy>(from: *const T) -> Result<T, Code> {
    if from.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: invariant 1.
    Ok(unsafe { from.read_unaligned() })
}

/// A caller's text.
pub fn text(from: *const c_char) -> Result<String, Code> {
    if from.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: invariant 1.
    let text = unsafe { CStr::from_ptr(from) };
    Ok(text.to_string_lossy().into_owned())
}

/// Writes a text and its null byte into a caller's array.
pub fn give_text(to: *mut c_char, len: usize, text: &str) -> Result<(), Code> {
    let room = len.checked_sub(1).ok_or(INVALID_VALUE)?;
    for (i, byte) in text.bytes().take(room).chain([0]).enumerate() {
        give(to.wrapping_add(i), byte as c_char)?;
    }
    Ok(())
}

/// Copies bytes, which may overlap.
pub fn copy(dst: usize, src: usize, len: usize) {
    let src = std::ptr::with_exposed_provenance::<u8>(src);
    let dst = std::ptr::with_exposed_provenance_mut::<u8>(dst);
    // SAFETY: invariant 2.
    unsafe { std::ptr::copy(src, dst, len) };
}

/// Sets bytes.
pub fn fill(dst: usize, value: u8, len: usize) {
    let dst = std::ptr::with_exposed_provenance_mut::<u8>(dst);
    // SAFETY: invariant 2.
    unsafe { dst.write_bytes(value, len) };
}

/// A number that other bytes would most probably not have. Not through references: others may write.
pub fn hash(src: usize, len: usize) -> u64 {
    let mut sum = len as u64;
    let words = std::ptr::with_exposed_provenance::<u64>(src);
    for i in 0..len / 8 {
        // SAFETY: invariant 2; any alignment.
        let word = unsafe { words.wrapping_add(i).read_unaligned() };
        sum = (sum ^ word)
            .wrapping_mul(0x9E37_79B9_7F4A_7C15)
            .rotate_left(29);
    }
    let bytes = std::ptr::with_exposed_provenance::<u8>(src);
    for i in len / 8 * 8..len {
        // SAFETY: invariant 2.
        let byte = unsafe { bytes.wrapping_add(i).read() };
        sum = (sum ^ u64::from(byte)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }
    sum
}

/// A file in memory.
pub fn memory_file(len: usize) -> Result<i32, Code> {
    let len = libc::off_t::try_from(len).map_err(|_| INVALID_VALUE)?;
    // SAFETY: a text of ours.
    let file = unsafe { libc::memfd_create(c"stub-device".as_ptr(), libc::MFD_CLOEXEC) };
    // SAFETY: a file that was just made; -1 is refused.
    match unsafe { libc::ftruncate(file, len) } {
        0 => Ok(file),
        _ => Err(crate::world::OUT_OF_MEMORY),
    }
}

/// Gives the pages of a range of it back.
pub fn punch(file: i32, offset: usize, len: usize) {
    let how = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: a file of ours; pages that stay would only cost memory.
    let _ = unsafe { libc::fallocate(file, how, offset as libc::off_t, len as libc::off_t) };
}

/// Whether a file is open for reads past the page cache.
pub fn is_direct(file: i32) -> bool {
    // SAFETY: asks for flags of a number; one that is no file is an error.
    let flags = unsafe { libc::fcntl(file, libc::F_GETFL) };
    flags >= 0 && flags & libc::O_DIRECT != 0
}

/// Reads into a map of ours.
pub fn read(file: i32, to: usize, len: usize, offset: i64) -> isize {
    let to = std::ptr::with_exposed_provenance_mut::<c_void>(to);
    // SAFETY: `len` bytes of a map that was just made (invariant 3); a number that is no file is an error.
    unsafe { libc::pread(file, to, len, offset) }
}

pub fn close(file: i32) {
    // SAFETY: a file of ours, closed once.
    let _ = unsafe { libc::close(file) };
}

/// Maps a file, or anonymous memory where there is none.
pub fn map(file: Option<i32>, len: usize, accessible: bool) -> Result<usize, Code> {
    let protection = if accessible {
        libc::PROT_READ | libc::PROT_WRITE
    } else {
        libc::PROT_NONE
    };
    let kind = match file {
        Some(_) => libc::MAP_SHARED | libc::MAP_NORESERVE,
        None => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    };
    let file = file.unwrap_or(-1);
    // SAFETY: a fresh map at an address that the system chooses.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, kind, file, 0) };
    if start == libc::MAP_FAILED {
        return Err(crate::world::OUT_OF_MEMORY);
    }
    Ok(start.expose_provenance())
}

/// Gives the pages of an anonymous map back, and leaves its addresses to nobody.
pub fn seal(start: usize, len: usize) {
    let start = std::ptr::with_exposed_provenance_mut::<c_void>(start);
    let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: a map of ours (invariant 3), which nothing uses any more.
    let _ = unsafe { libc::mmap(start, len, libc::PROT_NONE, kind, -1, 0) };
}

pub fn unmap(start: usize, len: usize) {
    let start = std::ptr::with_exposed_provenance_mut::<c_void>(start);
    // SAFETY: invariant 3.
    let _ = unsafe { libc::munmap(start, len) };
}

/// A function of a caller, to be called when a stream gets to it.
pub type HostFn = unsafe extern "C" fn(*mut c_void);

pub fn call(function: HostFn, argument: usize) {
    let argument = std::ptr::with_exposed_provenance_mut(argument);
    // SAFETY: the caller passed both for this.
    unsafe { function(argument) };
}

/// Has a function called when the process ends.
pub fn at_exit(function: extern "C" fn()) {
    // SAFETY: the library is never closed by those who use drivers.
    let _ = unsafe { libc::atexit(function) };
}

/// Ends the process at once.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: called at the end of the process, where nothing else is left to run.
    unsafe { libc::_exit(code) }
}
