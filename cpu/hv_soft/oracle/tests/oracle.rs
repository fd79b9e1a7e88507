//! A bounded comparison with the processor that runs the tests, and a check that the comparison can fail.

use oracle::{Config, run};

fn config(only: Option<&str>, cases_per_form: u32) -> Config {
    Config { seed: 1, cases_per_form, only: only.map(str::to_owned), max_failures: 40 }
}

/// Every form that the host has agrees; what is not compared is named and counted.
#[test]
fn interpreter_agrees_with_the_processor() {
    let report = run(&config(None, 40)).expect("the traced child runs");
    println!("{} cases of {} forms compared", report.compared, report.forms);
    println!("the host lacks {}: {}", report.lacking.len(), report.lacking.join(" "));
    println!("not built {}: {}", report.unbuilt.len(), report.unbuilt.join(" "));
    println!("not comparable: {}", report.excluded.len());
    assert!(report.failures.is_empty(), "{}", report.failures.join("\n"));
    assert!(report.unimplemented.is_empty(), "not implemented: {:?}", report.unimplemented);
    // The integer forms alone are several hundred on any host.
    assert!(report.forms > 900, "only {} forms were compared", report.forms);
}

/// Forms that no processor lacks are compared, not skipped.
#[test]
fn basic_forms_are_compared() {
    for form in ["add_rm64_r64", "div_rm32", "imul_r64_rm64_imm8", "movsb_m8_m8", "cvtsd2si_r64_xmmm64", "fadd_m64fp"] {
        let report = run(&config(Some(form), 30)).expect("the traced child runs");
        assert!(report.compared >= 25, "{form}: {} cases", report.compared);
        assert!(report.failures.is_empty(), "{}", report.failures.join("\n"));
    }
}
