//! What a format says about its image, once for programs and once for people: the text is the JSON with blanks for
//! dashes, lists numbered.

use serde_json::{Map, Value};

/// A fact, or some under one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Facts {
    /// Text.
    Text(String),
    /// Yes or no.
    Flag(bool),
    /// A number.
    Number(u64),
    /// Several of a kind.
    List(Vec<Facts>),
    /// Several with names, in the order people read them.
    Group(Vec<(&'static str, Facts)>),
}

impl From<&str> for Facts {
    fn from(text: &str) -> Facts {
        Facts::Text(text.to_owned())
    }
}
impl From<bool> for Facts {
    fn from(flag: bool) -> Facts {
        Facts::Flag(flag)
    }
}
impl From<u64> for Facts {
    fn from(number: u64) -> Facts {
        Facts::Number(number)
    }
}

impl Facts {
    /// For programs.
    pub fn to_json(&self) -> Value {
        match self {
            Facts::Text(text) => Value::from(text.as_str()),
            Facts::Flag(flag) => Value::from(*flag),
            Facts::Number(number) => Value::from(*number),
            Facts::List(all) => all.iter().map(Facts::to_json).collect(),
            Facts::Group(all) => {
                all.iter().map(|(name, facts)| ((*name).to_owned(), facts.to_json())).collect::<Map<_, _>>().into()
            }
        }
    }

    /// For people: a fact a line, those under a name indented by four blanks more.
    pub fn to_text(&self, depth: usize) -> String {
        let indent = "    ".repeat(depth);
        match self {
            Facts::Text(text) => text.clone(),
            Facts::Flag(flag) => flag.to_string(),
            Facts::Number(number) => number.to_string(),
            Facts::List(all) => {
                let numbered =
                    all.iter().enumerate().map(|(index, facts)| line(&indent, &format!("[{index}]"), facts, depth));
                numbered.collect()
            }
            Facts::Group(all) => {
                all.iter().map(|(name, facts)| line(&indent, &name.replace('-', " "), facts, depth)).collect()
            }
        }
    }
}

fn line(indent: &str, name: &str, facts: &Facts, depth: usize) -> String {
    match facts {
        Facts::List(_) | Facts::Group(_) => format!("{indent}{name}:\n{}", facts.to_text(depth + 1)),
        _ => format!("{indent}{name}: {}\n", facts.to_text(depth)),
    }
}

#[test]
fn people_and_programs_read_the_same() {
    let facts = Facts::Group(vec![
        ("compat", "1.1".into()),
        (
            "bitmaps",
            Facts::List(vec![Facts::Group(vec![
                ("flags", Facts::List(vec!["auto".into()])),
                ("granularity", 65536.into()),
            ])]),
        ),
        ("extended-l2", false.into()),
    ]);
    // As qemu-img 10.0.2 prints it.
    let text = "    compat: 1.1\n    bitmaps:\n        [0]:\n            flags:\n                [0]: auto\n            \
                granularity: 65536\n    extended l2: false\n";
    assert_eq!(facts.to_text(1), text);
    let json = serde_json::json!({
        "compat": "1.1", "bitmaps": [{"flags": ["auto"], "granularity": 65536}], "extended-l2": false,
    });
    assert_eq!(facts.to_json(), json);
}
