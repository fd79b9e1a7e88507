//! Rules: which requests fail, and when. Read from QEMU's configuration file format or from options. Pure.

use thiserror::Error;

use super::event::Event;

/// Most rules one file or name may have.
const RULES_MAX: usize = 1024;
/// Longest file of rules, in bytes.
pub(super) const FILE_MAX_BYTES: usize = 1 << 20;

/// A kind of request, as `iotype` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IoType {
    Read,
    Write,
    WriteZeroes,
    Discard,
    Flush,
    BlockStatus,
}

const IO_TYPES: [(&str, IoType); 6] = [
    ("read", IoType::Read),
    ("write", IoType::Write),
    ("write-zeroes", IoType::WriteZeroes),
    ("discard", IoType::Discard),
    ("flush", IoType::Flush),
    ("block-status", IoType::BlockStatus),
];

/// What happens when an event comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The event.
    pub(super) event: Event,
    /// The state that the file must be in; 0: any.
    pub(super) state: u64,
    pub(super) action: Action,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Requests fail from then on.
    Inject(Inject),
    /// The file goes to another state.
    SetState(u64),
}

/// Which requests fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Inject {
    /// The kind; `None`: all but questions about block status.
    pub(super) io_type: Option<IoType>,
    /// The host's error number; 0: none.
    pub(super) errno: i32,
    /// Only requests that cover the first byte of this sector of 512 bytes.
    pub(super) sector: Option<u64>,
    /// Only one request.
    pub(super) once: bool,
}

/// Why rules are refused. The texts are QEMU's where it has one.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs, reason = "the fields are named in the messages right above them")]
pub enum RuleError {
    #[error("There is no option group '{0}'")]
    Group(String),
    #[error("no group defined")]
    NoGroup,
    #[error("parse error")]
    Line,
    #[error("Invalid parameter '{0}'")]
    Parameter(String),
    #[error("[{section}] section doesn't support the option '{option}'")]
    Option { section: &'static str, option: String },
    #[error("Missing event name for rule")]
    NoEvent,
    #[error("invalid parameter value: {0}")]
    Name(String),
    #[error("Parameter '{0}' expects a number")]
    Number(&'static str),
    #[error("Parameter '{0}' expects 'on' or 'off'")]
    Switch(&'static str),
    #[error("the rules have more than {RULES_MAX} sections or {FILE_MAX_BYTES} bytes")]
    TooMany,
}

/// A section of rules: its options by name.
type Options = Vec<(String, String)>;

/// What a section is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Section {
    InjectError,
    SetState,
}

impl Section {
    pub(crate) const ALL: [Section; 2] = [Section::InjectError, Section::SetState];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Section::InjectError => "inject-error",
            Section::SetState => "set-state",
        }
    }

    fn options(self) -> &'static [&'static str] {
        match self {
            Section::InjectError => &["event", "state", "iotype", "errno", "sector", "once", "immediately"],
            Section::SetState => &["event", "state", "new_state"],
        }
    }
}

/// Reads a file of rules: `[inject-error]` and `[set-state]` sections of lines `option = "value"`.
/// (`qemu_config_foreach` in `util/qemu-config.c`.)
pub(super) fn parse_file(text: &str) -> Result<Vec<Rule>, RuleError> {
    if text.len() > FILE_MAX_BYTES {
        return Err(RuleError::TooMany);
    }
    let mut sections: Vec<(Section, Options)> = Vec::new();
    for line in text.lines() {
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(rest) = line.strip_prefix('[') {
            let name = rest.split([']', ' ']).next().unwrap_or_default();
            let known = Section::ALL.into_iter().find(|section| section.name() == name);
            sections.push((known.ok_or_else(|| RuleError::Group(name.to_owned()))?, Options::new()));
            continue;
        }
        let (section, options) = sections.last_mut().ok_or(RuleError::NoGroup)?;
        let (option, value) = option_of(line)?;
        if !section.options().contains(&option) {
            return Err(RuleError::Parameter(option.to_owned()));
        }
        options.push((option.to_owned(), value.to_owned()));
    }
    rules_of(&sections)
}

/// An option's name, up to a blank, and what stands between the quotes behind `=`.
fn option_of(line: &str) -> Result<(&str, &str), RuleError> {
    let line = line.trim();
    let (option, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let rest = rest.trim_start();
    if rest.is_empty() {
        return Ok((option, ""));
    }
    let quoted = rest.strip_prefix('=').map(str::trim_start);
    // A value without quotes is an empty one, as in QEMU.
    let value = quoted.ok_or(RuleError::Line)?.strip_prefix('"').and_then(|value| value.split('"').next());
    Ok((option, value.unwrap_or("")))
}

/// Reads sections, each a rule.
pub(crate) fn rules_of(sections: &[(Section, Options)]) -> Result<Vec<Rule>, RuleError> {
    if sections.len() > RULES_MAX {
        return Err(RuleError::TooMany);
    }
    sections.iter().map(|(section, options)| rule(*section, options)).collect()
}

fn rule(section: Section, options: &Options) -> Result<Rule, RuleError> {
    if let Some((option, _)) = options.iter().find(|(name, _)| !section.options().contains(&name.as_str())) {
        return Err(RuleError::Option { section: section.name(), option: option.clone() });
    }
    let value = |name: &str| options.iter().rev().find(|(known, _)| known == name).map(|(_, value)| value.as_str());
    let number = |name: &'static str| match value(name) {
        None => Ok(0),
        Some(text) => text.parse::<u64>().map_err(|_| RuleError::Number(name)),
    };
    let switch = |name: &'static str| match value(name) {
        None | Some("off") => Ok(false),
        Some("on") => Ok(true),
        Some(_) => Err(RuleError::Switch(name)),
    };
    let event = value("event").ok_or(RuleError::NoEvent)?;
    let event = Event::named(event).ok_or_else(|| RuleError::Name(event.to_owned()))?;
    let state = number("state")?;
    let action = match section {
        Section::SetState => Action::SetState(number("new_state")?),
        Section::InjectError => {
            // When an error comes makes no difference to requests that are waited for.
            switch("immediately")?;
            let errno = match value("errno") {
                None => rustix::io::Errno::IO.raw_os_error(),
                Some(text) => text.parse().ok().filter(|errno| *errno >= 0).ok_or(RuleError::Number("errno"))?,
            };
            let sector = value("sector").filter(|sector| *sector != "-1");
            let sector = sector.map(|text| text.parse().map_err(|_| RuleError::Number("sector"))).transpose()?;
            Action::Inject(Inject { io_type: io_type(value("iotype"))?, errno, sector, once: switch("once")? })
        }
    };
    Ok(Rule { event, state, action })
}

fn io_type(name: Option<&str>) -> Result<Option<IoType>, RuleError> {
    let Some(name) = name else { return Ok(None) };
    let known = IO_TYPES.iter().find(|(known, _)| *known == name).map(|(_, io_type)| *io_type);
    known.map(Some).ok_or_else(|| RuleError::Name(name.to_owned()))
}

#[test]
fn files_of_rules_are_read_as_qemu_reads_them() {
    let inject = |event, inject| Rule { event, state: 0, action: Action::Inject(inject) };
    let plain = Inject { io_type: None, errno: 5, sector: None, once: false };
    let text = "# a comment\n\n[inject-error]\nevent = \"write_aio\"\nerrno = \"28\"\nonce = \"on\"\n  sector=  \n\
                [set-state]\nevent = \"l2_load\"\nstate=\n";
    assert_eq!(parse_file(text), Err(RuleError::Parameter("sector=".to_owned())));
    let text = "# a comment\n\n[inject-error]\nevent = \"write_aio\"\nerrno = \"28\"\nonce = \"on\"\nsector = \"7\"\n\
                immediately = \"off\"\n[set-state]\n event = \"l2_load\"\nstate = \"1\"\nnew_state = \"2\"\n\
                [inject-error \"name\"]\nevent = \"none\"\niotype = \"block-status\"\nstate = \"2\"\nsector = \"-1\"\n";
    let want = vec![
        inject(Event::WRITE_AIO, Inject { errno: 28, once: true, sector: Some(7), ..plain }),
        Rule { event: Event::L2_LOAD, state: 1, action: Action::SetState(2) },
        Rule { state: 2, ..inject(Event::NONE, Inject { io_type: Some(IoType::BlockStatus), ..plain }) },
    ];
    assert_eq!(parse_file(text), Ok(want));
    // The messages are those of qemu-img 10.0.2 for the same files.
    for (text, want) in [
        ("[foo]", "There is no option group 'foo'"),
        ("[inject-error]\nfoo", "Invalid parameter 'foo'"),
        ("[inject-error]\nevent = \"bogus\"\n", "invalid parameter value: bogus"),
        ("[inject-error]\nerrno = \"5\"\n", "Missing event name for rule"),
        ("[inject-error]\nevent = l2_load\n", "invalid parameter value: "),
        ("[inject-error]\nevent = \"l2_load\"\nbogus=\"1\"\n", "Invalid parameter 'bogus=\"1\"'"),
        ("[inject-error]\nevent = \"l2_load\"\nerrno = \"x\"\n", "Parameter 'errno' expects a number"),
        ("[inject-error]\nevent = \"l2_load\"\niotype = \"x\"\n", "invalid parameter value: x"),
        ("event = \"l2_load\"\n", "no group defined"),
    ] {
        assert_eq!(parse_file(text).map_err(|error| error.to_string()), Err(want.to_owned()), "{text}");
    }
    assert_eq!(parse_file(&"[set-state]\nevent = \"none\"\n".repeat(1025)), Err(RuleError::TooMany));
}
