//! Rules: patterns over names, with placements, over all tensors of a table.

use std::fmt;
use std::sync::Arc;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::Value;

use crate::error::{Error, Reason, Result};
use crate::mesh::Mesh;
use crate::pattern;
use crate::placement::{Placement, WORDS};
use crate::request::{Place, Request, Wanted};
use crate::table::Table;

/// What a rule says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rule {
    /// One placement: of the axis `tp` (`pp` for an owner), or of the only axis with more than one
    /// coordinate.
    One(Placement),
    /// A placement an axis.
    Axes(Place),
}

/// Patterns with what they say, in order: the first that matches a name holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules(pub Vec<(String, Rule)>);

impl Rules {
    /// Rules as JSON: `{pattern: placement}` or `{pattern: {axis: placement}}`, in order.
    ///
    /// # Errors
    /// [`Reason::Form`].
    pub fn from_json(text: &str) -> Result<Rules> {
        serde_json::from_str(text).map_err(|error| Error::new(Reason::Form).found(error))
    }

    /// The request that places every tensor of a table by the first rule that matches its name.
    ///
    /// # Errors
    /// [`Reason::NoRule`] for a tensor that no rule matches, [`Reason::UnknownAxis`], and
    /// [`Reason::Placement`] for a lone placement whose axis is not clear.
    pub fn request(&self, table: &Table, mesh: &Mesh) -> Result<Request> {
        self.over(table.names(), mesh)
    }

    /// The request that places tensors of these names.
    ///
    /// # Errors
    /// As [`Rules::request`].
    pub fn over<'a>(
        &self,
        names: impl Iterator<Item = &'a Arc<str>>,
        mesh: &Mesh,
    ) -> Result<Request> {
        let rules: Result<Vec<(&str, Arc<Place>)>> = self
            .0
            .iter()
            .map(|(pattern, rule)| Ok((pattern.as_str(), Arc::new(rule.place(pattern, mesh)?))))
            .collect();
        let rules = rules?;
        let mut targets = Vec::with_capacity(names.size_hint().0);
        for name in names {
            let found = rules.iter().find(|rule| pattern::matches(rule.0, name));
            let Some((_, place)) = found else {
                return Err(Error::new(Reason::NoRule)
                    .tensor(name)
                    .found(format_args!("{} rules for other names", rules.len()))
                    .needed("a rule for it, or \"*\": \"replicate\" for all others"));
            };
            targets.push(Wanted {
                name: name.clone(),
                expr: None,
                dtype: None,
                place: place.clone(),
                local: None,
                note: None,
            });
        }
        Ok(Request {
            mesh: mesh.axes().to_vec(),
            alt: mesh.alt().to_vec(),
            targets,
            ..Request::default()
        })
    }
}

impl Rule {
    fn place(&self, pattern: &str, mesh: &Mesh) -> Result<Place> {
        match self {
            Rule::One(Placement::Replicate) => Ok(Place::new()),
            Rule::One(placement) => {
                let axis = lone(placement, mesh).ok_or_else(|| {
                    let names: Vec<&String> = mesh.axes().iter().map(|(name, _)| name).collect();
                    Error::new(Reason::Placement)
                        .range(format_args!("the rule for {pattern:?}"))
                        .found(format_args!("a placement for one of the axes {names:?}"))
                        .needed("the axis that it is for: {axis: placement}")
                })?;
                Ok(Place::from([(axis, placement.clone())]))
            }
            Rule::Axes(place) => {
                for name in place.keys() {
                    mesh.axis(name).ok_or_else(|| {
                        let error = mesh.unknown(name);
                        error.range(format_args!("the rule for {pattern:?}"))
                    })?;
                }
                Ok(place.clone())
            }
        }
    }
}

/// The axis that a placement without one is for.
fn lone(placement: &Placement, mesh: &Mesh) -> Option<String> {
    let usual = if matches!(placement, Placement::Owner(_)) {
        "pp"
    } else {
        "tp"
    };
    if mesh.axis(usual).is_some() {
        return Some(usual.to_owned());
    }
    let mut large = mesh.axes().iter().filter(|(_, size)| *size > 1);
    match (large.next(), large.next()) {
        (Some((name, _)), None) => Some(name.clone()),
        (None, _) => mesh.axes().first().map(|(name, _)| name.clone()),
        _ => None,
    }
}

impl<'de> Deserialize<'de> for Rule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Rule, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let lone = match &value {
            Value::String(_) => true,
            Value::Object(map) => {
                map.len() == 1 && map.keys().all(|key| WORDS.contains(&key.as_str()))
            }
            _ => false,
        };
        if lone {
            return serde_json::from_value(value)
                .map(Rule::One)
                .map_err(D::Error::custom);
        }
        serde_json::from_value(value)
            .map(Rule::Axes)
            .map_err(D::Error::custom)
    }
}

impl<'de> Deserialize<'de> for Rules {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Rules, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Rules;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of patterns and placements")
            }

            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Rules, A::Error> {
                let mut rules = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    rules.push(entry);
                }
                Ok(Rules(rules))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}
