//! Standard output, colours, progress and Ctrl-C.

use std::io::{self, BufWriter, IsTerminal, Stdout, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tonnage::engine::{Cancel, Progress};

/// Standard output. Once its reader has gone away (`| head`), writing succeeds and does nothing.
pub struct Out {
    inner: BufWriter<Stdout>,
    closed: bool,
    colour: bool,
}

impl Out {
    /// Standard output of this process.
    pub fn new() -> Self {
        let colour = io::stdout().is_terminal() && colours_wanted();
        Out {
            inner: BufWriter::with_capacity(1 << 16, io::stdout()),
            closed: false,
            colour,
        }
    }

    /// Whether to emphasise.
    pub fn colour(&self) -> bool {
        self.colour
    }

    fn quiet<T>(&mut self, result: io::Result<T>, instead: T) -> io::Result<T> {
        match result {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                self.closed = true;
                Ok(instead)
            }
            other => other,
        }
    }
}

/// <https://no-color.org>: any value but the empty one means no.
fn colours_wanted() -> bool {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    set("NO_COLOR").is_none() && set("TERM").is_none_or(|term| term != "dumb")
}

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.closed {
            return Ok(bytes.len());
        }
        let result = self.inner.write(bytes);
        self.quiet(result, bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.closed {
            return Ok(());
        }
        let result = self.inner.flush();
        self.quiet(result, ())
    }
}

/// The flag that Ctrl-C raises. The first call takes the signal over: work that looks at the flag
/// ends, removes what it has begun, and the exit code is 130. At the third signal the process ends
/// at once, for the case that a file system does not answer.
pub fn cancel() -> &'static Cancel {
    static CANCEL: OnceLock<Cancel> = OnceLock::new();
    CANCEL.get_or_init(|| {
        let cancel = Cancel::new();
        let raised = cancel.clone();
        let times = AtomicU8::new(0);
        // It fails only if there is a handler already; then that one stays.
        let _ = ctrlc::set_handler(move || {
            raised.cancel();
            if times.fetch_add(1, Ordering::Relaxed) >= 2 {
                std::process::exit(130);
            }
        });
        cancel
    })
}

/// A bar on standard error, on a terminal only; elsewhere it does nothing.
pub struct Bar(Option<ProgressBar>);

impl Bar {
    /// A bar for `total` bytes of this work.
    pub fn new(doing: &'static str, total: u64) -> Self {
        if !io::stdout().is_terminal() || !io::stderr().is_terminal() {
            return Bar(None);
        }
        let target = ProgressDrawTarget::stderr_with_hz(10);
        let bar = ProgressBar::with_draw_target(Some(total), target).with_message(doing);
        let style = ProgressStyle::with_template(
            "{msg} {bar:30} {percent:>3} %  {binary_bytes} of {binary_total_bytes}, \
             {binary_bytes_per_sec}, {eta} left",
        );
        Bar(Some(style.map_or(bar.clone(), |style| {
            bar.with_style(style.progress_chars("━╸ "))
        })))
    }

    /// More is done.
    pub fn add(&self, bytes: u64) {
        if let Some(bar) = &self.0 {
            bar.inc(bytes);
        }
    }

    /// So much is done, of so much.
    pub fn set(&self, progress: Progress) {
        if let Some(bar) = &self.0 {
            bar.set_length(progress.total);
            bar.set_position(progress.done);
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}
