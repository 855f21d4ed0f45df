//! Where a save goes: a file, or a folder.

use std::path::{Path, PathBuf};

use tonnage_format::shard_file_name;
use tonnage_storage as storage;

use crate::error::{Error, Result};
use crate::publish::is_simple;

/// Where a save goes.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub folder: PathBuf,
    pub stem: String,
    /// The file, where the caller named one.
    pub file: Option<PathBuf>,
}

impl Target {
    pub fn of(path: &Path, stem: &str) -> Result<Target> {
        let is_file = path.extension().is_some_and(|e| e == "safetensors") || path.is_file();
        if is_file && !path.is_dir() {
            let folder = match path.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
                _ => PathBuf::from("."),
            };
            let stem = path.file_stem().and_then(|stem| stem.to_str());
            let stem = stem.ok_or_else(|| {
                Error::usage("WRITER", format!("{} is no file name", path.display()))
            })?;
            return Ok(Target {
                folder,
                stem: stem.to_owned(),
                file: Some(path.to_owned()),
            });
        }
        if stem.is_empty() || stem.contains('/') || stem.starts_with('.') {
            return Err(Error::usage(
                "WRITER",
                format!("{stem:?} is no stem for file names"),
            ));
        }
        std::fs::create_dir_all(path).map_err(|e| storage::Error::at("create", path, e))?;
        Ok(Target {
            folder: path.to_owned(),
            stem: stem.to_owned(),
            file: None,
        })
    }

    /// The path of a single file, if replacing it is all there is to do.
    pub fn simple(&self, numbered: bool) -> Option<PathBuf> {
        match &self.file {
            Some(file) => Some(file.clone()),
            None if numbered => None,
            None => is_simple(&self.folder, &self.stem)
                .then(|| self.folder.join(shard_file_name(&self.stem, 1, 1))),
        }
    }
}
