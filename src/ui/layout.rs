//! Text for a terminal. It is wrapped at its width between words, and continues at the column that a
//! row marks with [`Styled::hang`]. [`Tone`] alone colours it.

use std::io::IsTerminal;
use std::os::fd::AsFd;

use textwrap::core::display_width;
use textwrap::{Options, WordSeparator, WordSplitter, WrapAlgorithm};

use super::{Styled, Tone, clean};

/// The assumed width of a terminal that does not report it.
const USUAL_WIDTH: usize = 80;

/// The columns of a terminal; `None` for a file or pipe, whose lines are not wrapped.
pub(super) fn width(stream: &(impl AsFd + IsTerminal)) -> Option<usize> {
    if !stream.is_terminal() {
        return None;
    }
    let stated = rustix::termios::tcgetwinsize(stream.as_fd()).ok();
    let columns = stated.map(|size| usize::from(size.ws_col));
    let environment = || std::env::var("COLUMNS").ok()?.parse().ok();
    columns
        .filter(|n| *n > 0)
        .or_else(environment)
        .or(Some(USUAL_WIDTH))
}

/// A line being composed.
#[derive(Default)]
struct Line {
    painted: String,
    columns: usize,
    hang: Option<usize>,
    /// Whether it is a command or path, which must not be broken to be copied.
    verbatim: bool,
}

impl Line {
    fn push(&mut self, tone: Tone, text: &str, colour: bool) {
        let text = clean(text);
        if tone == Tone::Hang {
            self.hang = Some(self.columns);
            return;
        }
        self.verbatim |= tone == Tone::Code;
        self.columns += display_width(&text);
        match tone.code() {
            Some(code) if colour && !text.is_empty() => {
                self.painted += &format!("\x1b[{code}m{text}\x1b[0m");
            }
            _ => self.painted += &text,
        }
    }

    fn wrapped(&self, width: Option<usize>) -> String {
        let fits = width.is_none_or(|width| self.columns <= width);
        let Some(width) = width.filter(|_| !fits && !self.verbatim) else {
            return self.painted.trim_end().to_owned();
        };
        let leading = self.painted.len() - self.painted.trim_start_matches(' ').len();
        let indent = self.hang.unwrap_or(leading + 2).min(width / 2);
        let indent = " ".repeat(indent);
        let options = Options::new(width)
            .subsequent_indent(&indent)
            .break_words(false)
            .word_separator(WordSeparator::AsciiSpace)
            .word_splitter(WordSplitter::NoHyphenation)
            .wrap_algorithm(WrapAlgorithm::FirstFit);
        let lines = textwrap::wrap(&self.painted, options);
        let lines: Vec<&str> = lines.iter().map(|line| line.trim_end()).collect();
        lines.join("\n")
    }
}

/// Renders text for a stream.
pub(super) fn render(text: &Styled, colour: bool, width: Option<usize>) -> String {
    let mut lines = vec![Line::default()];
    for (tone, part) in &text.0 {
        for (i, piece) in part.split('\n').enumerate() {
            if i > 0 {
                lines.push(Line::default());
            }
            if let Some(line) = lines.last_mut() {
                line.push(*tone, piece, colour);
            }
        }
    }
    let lines: Vec<String> = lines.iter().map(|line| line.wrapped(width)).collect();
    lines.join("\n").trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> Styled {
        let mut text = Styled::default();
        text.push(Tone::Plain, "  sata       ");
        text.hang();
        text.push(Tone::Warn, "not yet");
        text.push(Tone::Plain, " storahci does not start at boot");
        text
    }

    #[test]
    fn long_rows_continue_below_their_column() {
        let wrapped = render(&row(), false, Some(30));
        let lines: Vec<&str> = wrapped.lines().collect();
        assert_eq!(
            lines,
            [
                "  sata       not yet storahci",
                "             does not start at",
                "             boot"
            ]
        );
        assert!(lines.iter().all(|l| l.len() <= 30));
        assert_eq!(render(&row(), false, None).lines().count(), 1, "a pipe");
    }

    #[test]
    fn colours_take_no_columns() {
        let painted = render(&row(), true, Some(30));
        assert!(painted.contains("\u{1b}[33mnot yet\u{1b}[0m"), "{painted}");
        assert_eq!(painted.lines().count(), 3, "{painted}");
        assert!(!render(&row(), false, None).contains('\u{1b}'));
    }

    #[test]
    fn commands_and_long_words_stay_whole() {
        let mut text = Styled::default();
        text.push(Tone::Plain, "  ");
        text.push(Tone::Code, "hyper2kvm boot /a/long/path/to/a/folder");
        assert_eq!(render(&text, false, Some(20)).lines().count(), 1);
        let mut text = Styled::default();
        text.push(Tone::Plain, "opening /a/long/path/to/a/folder now");
        let wrapped = render(&text, false, Some(20));
        assert!(wrapped.contains("/a/long/path/to/a/folder"), "{wrapped}");
    }

    #[test]
    fn hostile_text_steers_nothing() {
        let mut text = Styled::default();
        text.push(Tone::Plain, "a\u{1b}[31mb\nc");
        assert_eq!(render(&text, true, Some(80)), "a[31mb\nc");
    }
}
