//! What dom0 tells us through Bochs's port 0xe9: lines of text, some of them for us.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

/// One line, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// `@progress DONE TOTAL TEXT`
    Progress {
        /// Steps done.
        done: u64,
        /// Steps in all.
        total: u64,
        /// What is being done.
        text: String,
    },
    /// `@exit N`: how the job's script ended.
    Exit(i32),
    /// The whole block from `@results-begin` to `@results-end`, decoded: a tar.gz. `Err` says what is wrong with it.
    Results(Result<Vec<u8>, String>),
    /// `@end`: it is all over, and everything has been said.
    End,
    /// A line of a results block.
    Data,
    /// Any other line.
    Text,
}

/// Understands one line after another.
#[derive(Debug, Default)]
pub struct Parser {
    results: Option<String>,
}

impl Parser {
    /// Before the first line.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Understands the next line, which may have its line end.
    pub fn line(&mut self, line: &str) -> Message {
        let line = line.trim_end();
        if line == "@results-end" {
            let block = self.results.take().ok_or_else(|| "its beginning is missing".to_owned());
            return Message::Results(block.and_then(|block| BASE64.decode(block).map_err(|e| e.to_string())));
        }
        if let Some(block) = &mut self.results {
            block.push_str(line);
            return Message::Data;
        }
        match line {
            "@results-begin" => {
                self.results = Some(String::new());
                Message::Data
            }
            "@end" => Message::End,
            _ => Self::progress(line).or_else(|| Self::exit(line)).unwrap_or(Message::Text),
        }
    }

    fn progress(line: &str) -> Option<Message> {
        let mut words = line.strip_prefix("@progress ")?.splitn(3, ' ');
        let (done, total) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        Some(Message::Progress { done, total, text: words.next().unwrap_or_default().to_owned() })
    }

    fn exit(line: &str) -> Option<Message> {
        Some(Message::Exit(line.strip_prefix("@exit ")?.parse().ok()?))
    }
}

/// Who crashed, if this line of a console says that somebody did.
#[must_use]
pub fn crash(line: &str) -> Option<&'static str> {
    const SIGNS: &[(&str, &str)] = &[
        ("Panic on CPU", "Xen"),
        ("FATAL TRAP", "Xen"),
        ("Kernel panic - not syncing", "dom0's kernel"),
        ("Hardware Dom0 crashed", "dom0"),
        ("domain_crash", "a guest"),
        // What the benchmark guest says before it shuts itself down as crashed; Xen has nothing to add to that.
        (") guest: exception ", "the benchmark guest"),
        (") guest: panic", "the benchmark guest"),
    ];
    if let Some((_, who)) = SIGNS.iter().find(|(sign, _)| line.contains(sign)) {
        return Some(who);
    }
    // Xen's own "Domain 3 (vcpu#0) crashed on cpu#1".
    (line.contains("Domain ") && line.contains("crashed on cpu")).then_some("a guest")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_understood() {
        let mut parser = Parser::new();
        assert_eq!(
            parser.line("@progress 3 20 view-step exec_bp\r\n"),
            Message::Progress { done: 3, total: 20, text: "view-step exec_bp".into() }
        );
        assert_eq!(parser.line("@progress 3 20"), Message::Progress { done: 3, total: 20, text: String::new() });
        assert_eq!(parser.line("@exit 4"), Message::Exit(4));
        assert_eq!(parser.line("@end"), Message::End);
        for text in ["@progress", "@progress x 20", "@exit", "@exit no", "@else", "hello @end", ""] {
            assert_eq!(parser.line(text), Message::Text, "{text:?}");
        }
    }

    #[test]
    fn results_are_decoded() {
        let mut parser = Parser::new();
        assert_eq!(parser.line("@results-begin"), Message::Data);
        assert_eq!(parser.line("aGVs"), Message::Data);
        assert_eq!(parser.line("bG8="), Message::Data);
        assert_eq!(parser.line("@results-end"), Message::Results(Ok(b"hello".to_vec())));
        assert_eq!(parser.line("aGVs"), Message::Text);
    }

    #[test]
    fn damaged_results_are_noticed() {
        let mut parser = Parser::new();
        assert!(matches!(parser.line("@results-end"), Message::Results(Err(_))));
        parser.line("@results-begin");
        parser.line("(XEN) something that does not belong here");
        assert!(matches!(parser.line("@results-end"), Message::Results(Err(_))));
    }

    #[test]
    fn crashes_are_recognised() {
        assert_eq!(crash("(XEN) Panic on CPU 0:"), Some("Xen"));
        assert_eq!(crash("[    1.2] Kernel panic - not syncing: no init"), Some("dom0's kernel"));
        assert_eq!(crash("(XEN) Domain 3 (vcpu#0) crashed on cpu#1:"), Some("a guest"));
        assert_eq!(crash("(XEN) domain_crash called from vmx.c:1234"), Some("a guest"));
        assert_eq!(crash("(d1) guest: exception 2 at 0x1103a8, error code 0x0, cr2 0x0"), Some("the benchmark guest"));
        assert_eq!(crash("[    1.2] crash hotplug support"), None);
    }
}
