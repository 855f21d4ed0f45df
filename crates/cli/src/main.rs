//! `tonnage`: look at model-weight files, check, compare and edit them.
//!
//! Translation only: verbs turn arguments into calls of the façade, and what it says into text or
//! JSON. What this crate promises: nothing from a file reaches a terminal unescaped; a failure is
//! one line and an exit code by kind ([`exit`]); a closed pipe is no failure; Ctrl-C leaves
//! nothing half-done; JSON carries a `schema` whose fields are only ever added to.

mod args;
mod exit;
mod glob;
mod json;
mod table;
mod terminal;
mod text;
mod tree;
mod verbs;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use crate::args::Cli;
use crate::terminal::Out;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let mut out = Out::new();
    let outcome = verbs::run(&cli, &mut out);
    let flushed = out.flush();
    let outcome = outcome.and_then(|code| flushed.map(|()| code).map_err(Into::into));
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            failure.tell(cli.common.json);
            ExitCode::from(failure.exit_code())
        }
    }
}

/// Help, version, or what is wrong with the arguments.
fn usage(error: &clap::Error) -> ExitCode {
    let plain = error.render().to_string();
    // clap repeats arguments, and a shell's glob may have put hostile file names among them.
    if plain.lines().all(|line| text::line(line) == line) {
        // A closed pipe here is no failure either.
        let _ = error.print();
    } else {
        for line in plain.lines() {
            let _ = writeln!(std::io::stderr(), "{}", text::line(line));
        }
    }
    ExitCode::from(error.exit_code() as u8)
}
