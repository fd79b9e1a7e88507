//! Options as a tree: JSON objects with dotted or nested keys, and `key=value,...` lists.

use std::collections::BTreeMap;

use super::{DEPTH_MAX, SpecError};

/// The options of one layer, by name.
pub(super) type Map = BTreeMap<String, Tree>;

/// An option's value: text, a group of options, or JSON's null.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Tree {
    /// Text; numbers and switches are text as well (`on`, `off`).
    Leaf(String),
    /// A group.
    Map(Map),
    /// JSON's null: explicitly nothing.
    Null,
}

/// Reads a JSON object.
pub(super) fn from_json(text: &str) -> Result<Tree, SpecError> {
    use serde_json::error::Category;
    if text.trim().is_empty() {
        return Err(SpecError::Json("Expecting a JSON value".to_owned()));
    }
    let value: serde_json::Value = serde_json::from_str(&double_quoted(text)).map_err(|error| {
        SpecError::Json(match error.classify() {
            Category::Eof => "JSON parse error, premature EOI".to_owned(),
            _ => format!("JSON parse error, {error}"),
        })
    })?;
    let serde_json::Value::Object(object) = value else { return Err(SpecError::NotAnObject) };
    let mut map = Map::new();
    insert_object(&mut map, object, 0)?;
    Ok(Tree::Map(map))
}

/// The same JSON with strings in double quotes: QEMU reads `'text'` too, which shells and its documentation prefer.
fn double_quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut string = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (string, c) {
            (None, '"' | '\'') => {
                string = Some(c);
                out.push('"');
            }
            (Some(quote), _) if c == quote => {
                string = None;
                out.push('"');
            }
            (Some(_), '"') => out.push_str("\\\""),
            (Some(_), '\\') => match chars.next() {
                Some('\'') => out.push('\''),
                next => out.extend(std::iter::once('\\').chain(next)),
            },
            _ => out.push(c),
        }
    }
    out
}

/// Puts the members of an object into a group that is `depth` groups down.
fn insert_object(
    map: &mut Map,
    object: serde_json::Map<String, serde_json::Value>,
    depth: usize,
) -> Result<(), SpecError> {
    use serde_json::Value;
    for (key, value) in object {
        let tree = match value {
            Value::Null => Tree::Null,
            Value::Bool(on) => Tree::Leaf(if on { "on" } else { "off" }.to_owned()),
            Value::Number(number) => Tree::Leaf(number.to_string()),
            Value::String(text) => Tree::Leaf(text),
            // The members of a list are named by their numbers.
            Value::Array(members) => {
                let mut inner = Map::new();
                let numbered = members.into_iter().enumerate().map(|(index, value)| (index.to_string(), value));
                insert_object(&mut inner, numbered.collect(), deeper(depth, &key)?)?;
                Tree::Map(inner)
            }
            Value::Object(object) => {
                let mut inner = Map::new();
                insert_object(&mut inner, object, deeper(depth, &key)?)?;
                Tree::Map(inner)
            }
        };
        insert(map, &key, tree, depth)?;
    }
    Ok(())
}

/// How deep a group in a group is.
fn deeper(depth: usize, key: &str) -> Result<usize, SpecError> {
    let inner = depth + 1 + key.matches('.').count();
    if inner > DEPTH_MAX { Err(SpecError::TooDeep) } else { Ok(inner) }
}

/// Reads `key=value,key=value`; a first word without `=` is the value of `implied`, a later one is a switch.
pub(super) fn from_options(text: &str, implied: &str) -> Result<Tree, SpecError> {
    let mut map = Map::new();
    for (index, item) in split_commas(text).into_iter().enumerate() {
        let (key, value) = match item.split_once('=') {
            Some((key, value)) => (key.to_owned(), value.to_owned()),
            None if index == 0 => (implied.to_owned(), item),
            None => match item.strip_prefix("no").filter(|rest| !rest.is_empty() && item != "node-name") {
                Some(rest) => (rest.to_owned(), "off".to_owned()),
                None => (item, "on".to_owned()),
            },
        };
        insert(&mut map, &key, Tree::Leaf(value), 0)?;
    }
    Ok(Tree::Map(map))
}

/// Splits at commas; two of them are one comma of the text.
pub fn split_commas(text: &str) -> Vec<String> {
    let mut items = Vec::new();
    let mut item = String::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c != ',' {
            item.push(c);
        } else if chars.next_if_eq(&',').is_some() {
            item.push(',');
        } else {
            items.push(std::mem::take(&mut item));
        }
    }
    if !item.is_empty() {
        items.push(item);
    }
    items
}

/// Puts a value at a dotted key of a group that is `depth` groups down; a later value replaces an earlier one.
fn insert(map: &mut Map, key: &str, value: Tree, mut depth: usize) -> Result<(), SpecError> {
    let mut map = map;
    let mut rest = key;
    while let Some((head, tail)) = rest.split_once('.') {
        depth += 1;
        if depth > DEPTH_MAX {
            return Err(SpecError::TooDeep);
        }
        match map.entry(head.to_owned()).or_insert_with(|| Tree::Map(Map::new())) {
            Tree::Map(inner) => map = inner,
            _ => return Err(SpecError::Twice(key.to_owned())),
        }
        rest = tail;
    }
    match (map.get_mut(rest), value) {
        (Some(Tree::Map(there)), Tree::Map(more)) => {
            for (name, tree) in more {
                insert(there, &name, tree, depth + 1)?;
            }
        }
        (Some(Tree::Map(_)), _) | (Some(_), Tree::Map(_)) => return Err(SpecError::Twice(key.to_owned())),
        (_, value) => {
            map.insert(rest.to_owned(), value);
        }
    }
    Ok(())
}

/// Puts options into a group that says nothing of them; `false` when it does.
pub(super) fn merge(map: &mut Map, more: Map) -> bool {
    more.into_iter().all(|(key, tree)| match (map.get_mut(&key), tree) {
        (Some(Tree::Map(there)), Tree::Map(more)) => merge(there, more),
        (Some(_), _) => false,
        (None, tree) => map.insert(key, tree).is_none(),
    })
}

/// Takes a text out of a layer's options.
pub(super) fn take_leaf(map: &mut Map, key: &str) -> Result<Option<String>, SpecError> {
    match map.remove(key) {
        None => Ok(None),
        Some(Tree::Leaf(text)) => Ok(Some(text)),
        Some(Tree::Map(_) | Tree::Null) => Err(SpecError::Parameter(key.to_owned())),
    }
}

/// What is left, with dotted names.
pub(super) fn flatten(map: Map) -> Vec<(String, String)> {
    let mut flat = Vec::new();
    for (key, tree) in map {
        match tree {
            Tree::Leaf(text) => flat.push((key, text)),
            Tree::Null => flat.push((key, String::new())),
            Tree::Map(inner) => {
                flat.extend(flatten(inner).into_iter().map(|(name, value)| (format!("{key}.{name}"), value)));
            }
        }
    }
    flat
}

/// A size as QEMU's option parser takes it: digits and at most one suffix.
pub(super) fn number(option: &str, text: &str) -> Result<u64, SpecError> {
    let bad = || SpecError::Number { option: option.to_owned() };
    let range = || SpecError::Range { option: option.to_owned(), found: text.to_owned() };
    let digits_end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(digits_end);
    if digits.is_empty() {
        return Err(if unit.starts_with('-') { range() } else { bad() });
    }
    let shift = match unit {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return Err(bad()),
    };
    let value: u64 = digits.parse().map_err(|_| range())?;
    value.checked_mul(1 << shift).ok_or_else(range)
}

/// One line of JSON in QEMU's spacing.
pub(super) fn print(tree: &Tree) -> String {
    match tree {
        Tree::Null => "null".to_owned(),
        Tree::Leaf(text) if !text.is_empty() && text.len() < 19 && text.bytes().all(|b| b.is_ascii_digit()) => {
            text.clone()
        }
        Tree::Leaf(text) => serde_json::Value::from(text.as_str()).to_string(),
        Tree::Map(map) => {
            let fields: Vec<String> = map
                .iter()
                .map(|(key, tree)| format!("{}: {}", serde_json::Value::from(key.as_str()), print(tree)))
                .collect();
            format!("{{{}}}", fields.join(", "))
        }
    }
}

#[test]
fn strings_may_stand_in_either_quotes() {
    for (text, want) in [
        (r#"{'driver':'raw',"a":"b"}"#, r#"{"driver":"raw","a":"b"}"#),
        (r#"{'a"b':'c\'d\"e\\'}"#, r#"{"a\"b":"c'd\"e\\"}"#),
        (r#"{"it's":1,"\'":'\n'}"#, r#"{"it's":1,"'":"\n"}"#),
        (r#"{'a"#, r#"{"a"#),
        (r#"{'a\"#, r#"{"a\"#),
    ] {
        assert_eq!(double_quoted(text), want, "{text}");
    }
}
