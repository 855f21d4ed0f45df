//! GPUDirect Storage: reads of files straight into the memory of NVIDIA's cards, by cuFile, opened at run time.
//!
//! It is used only where it is asked for, and only after it was seen to work, since its start can hang for good or
//! end the process (version 1.20 did the first on a machine without a card). [`Gds::open`] looks, in this order:
//!
//! 1. whether the kernel has what it takes: nvidia-fs with a device, or a card that offers its memory to other
//!    devices on the PCI bus;
//! 2. whether its log has a place: without `CUFILE_LOGFILE_PATH` it writes `cufile.log` into the current folder;
//! 3. whether it starts in a child process, within a limit;
//! 4. whether it starts here.
//!
//! Its "compatible mode", which reads through host memory, is never used: the ring of staging buffers does the same,
//! with a budget and in order.
//!
//! What it promises: a read fills whole ranges of memory that it was checked against; memory that cuFile has
//! registered is given back before it is freed; nothing here follows a stream's order, so whoever reads waits for
//! streams first.

mod child;
mod signs;
mod table;

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub use signs::Way;

use crate::driver::CudaMemory;
use crate::{Cause, DeviceId, DeviceMemory, Error, Kind};
use table::{Registered, Table};

/// How cuFile is found and tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Its library, instead of the one that the system has.
    pub library: Option<PathBuf>,
    /// What `CUFILE_LOGFILE_PATH` is in this process: where its log goes.
    pub log: Option<PathBuf>,
    /// A program with its arguments that calls [`attempt`], writes the error to its standard error, and ends with
    /// success if there was none.
    pub child: Vec<OsString>,
    /// How long that may take: CUDA's own start takes seconds on large machines.
    pub limit: Duration,
    /// Where the system shows what it has; `/` but for tests.
    pub root: PathBuf,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            library: None,
            log: None,
            child: Vec::new(),
            limit: Duration::from_secs(20),
            root: PathBuf::from("/"),
        }
    }
}

/// The smallest unit of a disk.
const SECTOR: usize = 512;

fn missing(text: String) -> Error {
    let id = DeviceId::new(Kind::Cuda, 0);
    Error::new(id, "use GPUDirect Storage", Cause::Missing(text))
}

/// What the kernel has for it, without opening the library.
///
/// # Errors
/// [`Cause::Missing`] with what to do.
pub fn kernel(settings: &Settings) -> Result<Way, Error> {
    signs::look(&settings.root).map_err(missing)
}

/// Looks at the kernel, then starts cuFile in a child process: whether [`Gds::open`] would work here.
///
/// # Errors
/// As [`Gds::open`].
pub fn probe(settings: &Settings) -> Result<Way, Error> {
    let way = kernel(settings)?;
    child::run(settings).map_err(missing)?;
    Ok(way)
}

/// Starts cuFile in this process, and ends it: for the child process of [`Settings::child`].
///
/// # Errors
/// What kept it from starting.
pub fn attempt(library: Option<&Path>) -> Result<(), Error> {
    let started = Table::load(library).and_then(|table| {
        table.start()?;
        table.end()
    });
    started.map_err(missing)
}

/// cuFile, started.
#[derive(Clone, Debug)]
pub struct Gds {
    table: &'static Table,
    way: Way,
}

impl Gds {
    /// Starts cuFile, if it was seen to start in a child process. It is never ended: others of this process may use
    /// it, too.
    ///
    /// # Errors
    /// [`Cause::Missing`] with what is missing, and what to do.
    pub fn open(settings: &Settings) -> Result<Gds, Error> {
        let way = kernel(settings)?;
        if settings.log.is_none() {
            let text = "CUFILE_LOGFILE_PATH is not set, so cuFile would write cufile.log into the current folder: set \
                        it before the program starts, to /dev/null for no log";
            return Err(missing(text.to_owned()));
        }
        child::run(settings).map_err(missing)?;
        let table = Table::load(settings.library.as_deref()).map_err(missing)?;
        table.start().map_err(missing)?;
        Ok(Gds { table, way })
    }

    /// As [`Gds::open`], once for each settings: later calls get the first one's answer.
    ///
    /// # Errors
    /// As [`Gds::open`].
    pub fn shared(settings: &Settings) -> Result<Gds, Error> {
        static TRIED: Mutex<Vec<(Settings, Result<Gds, Error>)>> = Mutex::new(Vec::new());
        // Whoever comes meanwhile waits for the same answer.
        let mut tried = TRIED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, answer)) = tried.iter().find(|(with, _)| with == settings) {
            return answer.clone();
        }
        let answer = Self::open(settings);
        tried.push((settings.clone(), answer.clone()));
        answer
    }

    /// What the kernel has for it.
    pub fn way(&self) -> Way {
        self.way
    }

    /// Takes a file that is open for direct reads.
    ///
    /// # Errors
    /// What cuFile said: the file system, or the disk below it, may not be supported.
    pub fn file(&self, file: &File) -> Result<GdsFile, Error> {
        let file = file
            .try_clone()
            .map_err(|error| missing(format!("a file could not be shared: {error}")))?;
        let registered = self.table.register(&file).map_err(missing)?;
        Ok(GdsFile {
            table: self.table,
            registered,
            _file: file,
        })
    }
}

/// A file that cuFile reads.
#[derive(Debug)]
pub struct GdsFile {
    table: &'static Table,
    registered: Registered,
    /// Open for as long as cuFile has it.
    _file: File,
}

impl GdsFile {
    /// Reads `len` bytes from `offset` on to `at` in a card's memory, and waits for them. How many there were: fewer
    /// only at the end of the file. It follows no stream: whatever else uses these bytes has to be over.
    ///
    /// # Errors
    /// [`Cause::Invalid`] for a range that leaves the memory, or memory of another kind; [`Cause::Driver`] with what
    /// cuFile said, and the content of the range is unspecified then.
    pub fn read(
        &self,
        offset: u64,
        memory: &dyn DeviceMemory,
        at: u64,
        len: usize,
    ) -> Result<usize, Error> {
        const DOING: &str = "read a file into its memory";
        let id = memory.device();
        let refused = |text: &str| Error::new(id, DOING, Cause::Invalid(text.to_owned()));
        let cuda = CudaMemory::of(memory).ok_or_else(|| refused("that is no memory of CUDA's"))?;
        if at
            .checked_add(len as u64)
            .is_none_or(|end| end > memory.len())
        {
            return Err(refused("a read leaves its memory"));
        }
        let _entered = cuda.enter()?;
        cuda.register(|| {
            let len = usize::try_from(memory.len()).ok()?;
            // Where it is refused, cuFile goes by memory of its own on the card.
            self.table.take(memory.address(), len).ok()?;
            Some(Taken {
                table: self.table,
                address: memory.address(),
            })
        });
        let mut done = 0;
        // No disk goes on within a sector: a read that ends there is the file's last.
        while done < len && done.is_multiple_of(SECTOR) {
            let (from, to) = (offset.saturating_add(done as u64), at + done as u64);
            let place = (memory.address(), to);
            let got = self.table.read(&self.registered, place, from, len - done);
            match got {
                Ok(0) => break,
                Ok(got) if got > len - done => {
                    return Err(refused("cuFile says that it read more"));
                }
                Ok(got) => done += got,
                Err((code, text)) => {
                    let text = format!("{text} (cuFile)");
                    return Err(Error::new(id, DOING, Cause::Driver { code, text }));
                }
            }
        }
        Ok(done)
    }
}

impl Drop for GdsFile {
    fn drop(&mut self) {
        self.table.deregister(&self.registered);
    }
}

/// Device memory that cuFile has; given back when this is dropped, which is before the memory is freed.
#[derive(Debug)]
pub(crate) struct Taken {
    table: &'static Table,
    address: u64,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.table.give_back(self.address);
    }
}

/// cuFile as a load has it.
#[derive(Clone, Debug, Default)]
pub enum Use {
    /// Nobody asked for it.
    #[default]
    Off,
    /// Large parts of files go by it.
    On(Arc<Gds>),
    /// It was asked for, and this is why it is not used.
    Not(String),
}

impl Use {
    /// What there is, where it is asked for.
    pub fn wanted(settings: &Settings) -> Self {
        match Gds::shared(settings) {
            Ok(gds) => Use::On(Arc::new(gds)),
            Err(error) => Use::Not(error.cause().to_string()),
        }
    }
}
