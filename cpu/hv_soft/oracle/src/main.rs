//! `oracle [--seed S] [--cases N] [--only NAME] [--seconds T]`: compares the software CPU with this processor.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::{Duration, Instant};

use oracle::{Config, Report, run};

fn main() -> ExitCode {
    match compare() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("oracle: {error}");
            ExitCode::FAILURE
        }
    }
}

fn compare() -> Result<bool, Box<dyn std::error::Error>> {
    let mut config = Config { seed: 1, cases_per_form: 50, only: None, max_failures: 40 };
    let mut limit = Duration::ZERO;
    let mut args = std::env::args().skip(1);
    while let Some(option) = args.next() {
        let value = args.next().ok_or(format!("{option} needs a value"))?;
        match option.as_str() {
            "--seed" => config.seed = value.parse()?,
            "--cases" => config.cases_per_form = value.parse()?,
            "--only" => config.only = Some(value.to_lowercase()),
            "--seconds" => limit = Duration::from_secs(value.parse()?),
            other => return Err(format!("there is no option {other}").into()),
        }
    }
    let start = Instant::now();
    loop {
        let report = run(&config)?;
        print(&config, &report);
        if !report.failures.is_empty() {
            return Ok(false);
        }
        if start.elapsed() >= limit {
            return Ok(true);
        }
        config.seed += 1;
    }
}

fn print(config: &Config, report: &Report) {
    for failure in &report.failures {
        println!("{failure}");
    }
    for (name, count) in &report.unimplemented {
        println!("not implemented: {name} ({count} cases)");
    }
    if config.only.is_some() {
        report.excluded.iter().for_each(|(name, reason)| println!("not compared: {name}: {reason}"));
    }
    println!(
        "seed {}: {} cases of {} forms compared, {} different; {} forms the host lacks, {} not comparable, {} not built",
        config.seed,
        report.compared,
        report.forms,
        report.failures.len(),
        report.lacking.len(),
        report.excluded.len(),
        report.unbuilt.len()
    );
    if !report.unbuilt.is_empty() {
        println!("not built: {}", report.unbuilt.join(" "));
    }
}
