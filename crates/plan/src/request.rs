//! Requests: what edges send, as JSON. Which tensors are wanted, put together from what, and on which
//! ranks.
//!
//! ```json
//! {"mesh": [["pp", 2], ["tp", 4]],
//!  "targets": [{"name": "q", "place": {"tp": {"shard": {"dim": 0}}}},
//!              {"name": "norm", "dtype": "F32", "place": {"pp": {"owner": [1]}}}],
//!  "unread": ["*.rotary_emb.*"]}
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tonnage_format::Dtype;

use crate::error::{Error, Reason, Result};
use crate::expr::Expr;
use crate::mesh::Mesh;
use crate::pattern;
use crate::placement::Placement;

/// Placements by the name of their axis. An axis that is not named replicates.
pub type Place = BTreeMap<String, Placement>;

/// What is wanted of a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Axes with their sizes, outermost first.
    pub mesh: Vec<(String, u32)>,
    /// Other factorisations of the same ranks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub alt: Vec<Vec<(String, u32)>>,
    /// The tensors, in the order of their first use.
    pub targets: Vec<Wanted>,
    /// Whether tensors, or parts of them, may stay unread.
    #[serde(default, skip_serializing_if = "Allow::is_error")]
    pub unread: Allow,
    /// Whether a source may be read by several targets, other than whole by each of them.
    #[serde(default, skip_serializing_if = "Allow::is_error")]
    pub repeated: Allow,
}

/// A tensor that is wanted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// Its name.
    pub name: Arc<str>,
    /// What it is put together from. Default: the tensor of its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expr: Option<Expr>,
    /// The dtype to cast to, after its bytes have been read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Dtype>,
    /// Where it goes.
    #[serde(default)]
    pub place: Arc<Place>,
    /// What ranks call it, if not by its name: layers of a pipeline stage are counted anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<Arc<str>>,
    /// What people should know of it: how a quantised tensor was cut, say. It changes nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<Arc<str>>,
}

/// Whether something that is usually a mistake may be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Allow {
    /// Nowhere, or everywhere.
    All(Word),
    /// For the names that one of these patterns matches.
    Some(Vec<String>),
    /// Not said: nowhere.
    #[default]
    Unsaid,
}

/// `"error"` or `"allow"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Word {
    /// Nowhere.
    Error,
    /// Everywhere.
    Allow,
}

impl Allow {
    /// Everywhere.
    pub const ALL: Allow = Allow::All(Word::Allow);

    /// Whether it may be for a tensor of this name.
    pub fn allows(&self, name: &str) -> bool {
        match self {
            Allow::All(word) => *word == Word::Allow,
            Allow::Some(patterns) => patterns.iter().any(|one| pattern::matches(one, name)),
            Allow::Unsaid => false,
        }
    }

    pub(crate) fn is_error(&self) -> bool {
        matches!(self, Allow::Unsaid | Allow::All(Word::Error))
    }
}

impl Wanted {
    /// A tensor of the checkpoint as it is, placed so.
    pub fn new(name: &str, place: Place) -> Wanted {
        Wanted {
            name: name.into(),
            expr: None,
            dtype: None,
            place: Arc::new(place),
            local: None,
            note: None,
        }
    }
}

impl Request {
    /// A request as JSON.
    ///
    /// # Errors
    /// [`Reason::Form`], with the line and column at which it does not have the form of one.
    pub fn from_json(text: &str) -> Result<Request> {
        serde_json::from_str(text).map_err(|error| Error::new(Reason::Form).found(error))
    }

    /// The request as JSON.
    pub fn to_json(&self) -> String {
        // Keys are strings and there are no floats, so nothing here can fail.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Its mesh.
    ///
    /// # Errors
    /// As [`Mesh::with_alt`].
    pub fn mesh(&self) -> Result<Mesh> {
        Mesh::with_alt(self.mesh.clone(), self.alt.clone())
    }
}
