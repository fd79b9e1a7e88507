//! ARCHITECTURE.md and the crates say the same: every crate has its paragraph, and every dependency between crates of
//! the house is an arrow there.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::run::{cargo, output, root};

/// Every difference, as a sentence.
pub fn check() -> Result<Vec<String>> {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).context("ARCHITECTURE.md cannot be read")?;
    let written = arrows_written(&text);
    let real = arrows_real()?;
    let mut problems = Vec::new();
    for (name, needs) in &real {
        match written.get(name) {
            None => problems.push(format!("crate {name} has no line in ARCHITECTURE.md")),
            Some(arrows) if arrows != needs => problems.push(format!(
                "crate {name} depends on [{}] but ARCHITECTURE.md says [{}]",
                needs.join(" "),
                arrows.join(" ")
            )),
            Some(_) => {}
        }
    }
    for name in written.keys().filter(|n| !real.contains_key(*n)) {
        problems.push(format!("ARCHITECTURE.md describes crate {name}, which does not exist"));
    }
    Ok(problems)
}

/// Lines of the form ``- `path/name` -> a b c: text``; no arrow where a crate knows no other.
fn arrows_written(text: &str) -> BTreeMap<String, Vec<String>> {
    let mut found = BTreeMap::new();
    for line in text.lines() {
        let Some((path, rest)) = line.strip_prefix("- `").and_then(|l| l.split_once('`')) else { continue };
        let name = path.rsplit('/').next().unwrap_or(path).to_owned();
        let arrows = rest.strip_prefix(" -> ").and_then(|r| r.split_once(':')).map_or("", |(a, _)| a);
        let mut arrows: Vec<String> = arrows.split_whitespace().map(str::to_owned).collect();
        arrows.sort();
        found.insert(name, arrows);
    }
    found
}

fn arrows_real() -> Result<BTreeMap<String, Vec<String>>> {
    let text = output(cargo().args(["metadata", "--format-version", "1", "--no-deps", "--offline"]))?;
    let metadata: Value = serde_json::from_str(&text).context("cargo metadata printed no JSON")?;
    let packages = metadata["packages"].as_array().context("cargo metadata lists no packages")?;
    let names: Vec<&str> = packages.iter().filter_map(|p| p["name"].as_str()).collect();
    let mut found = BTreeMap::new();
    for package in packages {
        let name = package["name"].as_str().unwrap_or_default();
        let empty = Vec::new();
        let mut needs: Vec<String> = package["dependencies"]
            .as_array()
            .unwrap_or(&empty)
            .iter()
            .filter(|d| d["kind"].is_null())
            .filter_map(|d| d["name"].as_str())
            .filter(|d| names.contains(d))
            .map(str::to_owned)
            .collect();
        needs.sort();
        needs.dedup();
        found.insert(name.to_owned(), needs);
    }
    Ok(found)
}
