//! What the argument parser has to say, as one sentence.

use clap::error::{ContextKind, ContextValue, Error, ErrorKind};

use crate::exit::UsageError;

/// `error` in one sentence, with the suggestion that the parser may have. `command`: whose help tells more.
pub fn sentence(error: &Error, command: &str) -> UsageError {
    // The first paragraph says what is wrong; tips and usage follow.
    let text = error.render().to_string();
    let paragraph = text.split("\n\n").next().unwrap_or_default();
    let words: Vec<&str> = paragraph.split_whitespace().skip_while(|word| *word == "error:").collect();
    let mut sentence = words.join(" ");
    let suggestions =
        [ContextKind::SuggestedArg, ContextKind::SuggestedSubcommand, ContextKind::SuggestedValue];
    if let Some(similar) = suggestions.iter().find_map(|kind| error.get(*kind)).and_then(first) {
        sentence += &format!("; did you mean '{similar}'?");
    } else if let Some(word) = stray_word(error).filter(|_| command.ends_with(" run")) {
        sentence += &format!("; a command for the guest goes behind '--': '{command} -- {word}'");
        sentence += &format!(", and see '{command} --help'");
    } else {
        sentence += &format!("; see '{command} --help'");
    }
    UsageError(sentence)
}

/// The argument that belongs to no flag, and looks like none.
fn stray_word(error: &Error) -> Option<&str> {
    let word = error.get(ContextKind::InvalidArg).and_then(first)?;
    (error.kind() == ErrorKind::UnknownArgument && !word.starts_with('-')).then_some(word)
}

fn first(value: &ContextValue) -> Option<&str> {
    match value {
        ContextValue::String(text) => Some(text),
        ContextValue::Strings(texts) => texts.first().map(String::as_str),
        _ => None,
    }
}
