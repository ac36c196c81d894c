//! Figures as a table for people and as JSON for programs.

use std::fmt;

use serde::Serialize;

use super::measure::{Cost, Subject, median};

/// Named rows of named figures.
#[derive(Debug, Serialize)]
pub struct Table {
    /// What was measured, in a sentence.
    pub title: String,
    /// Names of the columns, with units.
    pub columns: Vec<String>,
    /// Rows.
    pub rows: Vec<Row>,
    /// What a reader has to know.
    pub notes: Vec<String>,
}

/// A row of figures, in the order of the columns.
#[derive(Debug, Serialize)]
pub struct Row {
    /// What the figures are of.
    pub name: String,
    /// One value a column.
    pub values: Vec<f64>,
}

impl Table {
    /// An empty table.
    pub fn new(title: impl Into<String>, columns: impl IntoIterator<Item = impl Into<String>>) -> Self {
        let columns = columns.into_iter().map(Into::into).collect();
        Self { title: title.into(), columns, rows: Vec::new(), notes: Vec::new() }
    }

    /// A table of whole processes: a row a subject with the medians of its costs, and the ratio of the first
    /// to each other one.
    pub fn of_processes(title: impl Into<String>, subjects: &[Subject], costs: &[Vec<Cost>]) -> Self {
        let mut table = Self::new(title, ["CPU ms", "wall ms", "least wall ms", "most wall ms"]);
        for (subject, costs) in subjects.iter().zip(costs) {
            let millis =
                |duration: Option<std::time::Duration>| duration.map_or(f64::NAN, |d| d.as_secs_f64() * 1e3);
            table.row(
                &subject.name,
                &[
                    millis(median(costs.iter().map(|cost| cost.cpu))),
                    millis(median(costs.iter().map(|cost| cost.wall))),
                    millis(costs.iter().map(|cost| cost.wall).min()),
                    millis(costs.iter().map(|cost| cost.wall).max()),
                ],
            );
        }
        let [first, others @ ..] = &table.rows[..] else { return table };
        let ratios: Vec<Row> = others
            .iter()
            .map(|other| Row {
                name: format!("{} / {}", first.name, other.name),
                values: first.values.iter().zip(&other.values).map(|(a, b)| a / b).collect(),
            })
            .collect();
        table.rows.extend(ratios);
        table
    }

    /// Appends a row.
    pub fn row(&mut self, name: &str, values: &[f64]) {
        self.rows.push(Row { name: name.into(), values: values.to_vec() });
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.title)?;
        let name = self.rows.iter().map(|row| row.name.len()).max().unwrap_or(0);
        let width = |column: &str| column.len().max(9);
        write!(f, "{:name$}", "")?;
        for column in &self.columns {
            write!(f, "  {column:>0$}", width(column))?;
        }
        for row in &self.rows {
            write!(f, "\n{:name$}", row.name)?;
            for (value, column) in row.values.iter().zip(&self.columns) {
                match value.is_nan() {
                    true => write!(f, "  {:>1$}", "-", width(column))?,
                    false => write!(f, "  {value:>0$.2}", width(column))?,
                }
            }
        }
        for note in &self.notes {
            write!(f, "\n- {note}")?;
        }
        Ok(())
    }
}
