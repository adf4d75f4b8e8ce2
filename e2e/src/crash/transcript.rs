//! What a run has said, taken into the model line by line.

use std::collections::BTreeSet;

use serde_json::Value;

use super::found::Found;
use super::judge::{Failure, Total, judge};
use super::model::Model;
use super::player::Said;
use super::step::{Answer, Step};

/// Everything that was said so far; a line that is not whole yet is not said.
pub fn read(output: &[u8]) -> Vec<Said> {
    let whole = output.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    output[..whole]
        .split(|byte| *byte == b'\n')
        .filter_map(|line| serde_json::from_slice(line).ok())
        .collect()
}

/// What a transcript comes to.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Everything that was acknowledged.
    pub model: Model,
    /// The step that was begun and not acknowledged.
    pub cut_off: Option<Step>,
    /// What did not hold.
    pub failures: Vec<Failure>,
    /// Operations acknowledged.
    pub acknowledged: u64,
    /// Blocks compared.
    pub compared: u64,
    /// Someone has looked, and it was compared.
    pub judged: bool,
}

/// Takes in what was said of these steps, on top of `model`.
///
/// Only what `counts` is acknowledged: with a disk that was made from the log, what came later has not happened. A step
/// that is refused counts as cut off if it is at or after `refusable`, because the disk refused writes; otherwise that is a
/// failure.
pub fn take(
    model: &Model,
    steps: &[Step],
    said: &[Said],
    counts: impl Fn(usize) -> bool,
    refusable: Option<usize>,
) -> Outcome {
    let mut outcome = Outcome { model: model.clone(), ..Outcome::default() };
    let mut begun = BTreeSet::new();
    for line in said {
        match line {
            Said::Begun(number) => drop(begun.insert(*number)),
            Said::Answered(number, answer) => {
                outcome.answered(
                    *number,
                    steps,
                    Answer::read(answer),
                    &answer.to_string(),
                    &counts,
                    refusable,
                );
            }
            Said::Written(number) if counts(*number) => outcome.acknowledge(steps.get(*number)),
            Said::Held(number, held) => outcome.held(steps.get(*number), held),
            Said::Seen(_, text) => {
                outcome.failures.extend(judge(&outcome.model, &Found::read(text)));
                outcome.judged = true;
            }
            Said::NotWritten(number, why) if !is_refusable(refusable, *number) => {
                outcome.fail(Total::Other, format!("{:?} failed: {why}", steps.get(*number)));
            }
            Said::NotRead(number, why) => {
                outcome.fail(Total::LostAcknowledged, format!("{:?} failed: {why}", steps.get(*number)));
            }
            Said::Ended(how) if refusable.is_none() => {
                outcome.fail(Total::Other, format!("the program has ended: {how}"));
            }
            Said::Started | Said::Took(..) | Said::Written(_) | Said::NotWritten(..) | Said::Ended(_) => {}
        }
    }
    outcome.cut_off = Outcome::first_open(steps, said, &begun, &counts);
    if let Some(step) = &outcome.cut_off {
        outcome.model.cut_off(step);
    }
    outcome
}

/// Whether a step may be refused that comes at or after the first one that may be.
fn is_refusable(first: Option<usize>, number: usize) -> bool {
    first.is_some_and(|first| first <= number)
}

impl Outcome {
    fn fail(&mut self, total: Total, what: String) {
        self.failures.push(Failure { total, what });
    }

    fn acknowledge(&mut self, step: Option<&Step>) {
        if let Some(step) = step {
            self.model.apply(step);
            self.acknowledged += u64::from(step.kind().is_some());
        }
    }

    fn answered(
        &mut self,
        number: usize,
        steps: &[Step],
        answer: Option<Answer>,
        text: &str,
        counts: &impl Fn(usize) -> bool,
        refusable: Option<usize>,
    ) {
        let step = steps.get(number);
        match answer {
            Some(Answer::Done(findings)) => {
                for finding in findings {
                    self.fail(Total::RecordMismatch, format!("the program's own check finds: {finding}"));
                }
                if counts(number) {
                    self.acknowledge(step);
                }
            }
            // What was cut off had come to its end.
            Some(Answer::Refused(why)) if number == 0 && step.is_some_and(|step| step.is_gone(&why)) => {
                if counts(number) {
                    self.acknowledge(step);
                }
            }
            Some(Answer::Refused(why)) if !is_refusable(refusable, number) => {
                self.fail(Total::Other, format!("{step:?} was refused: {why}"));
            }
            Some(Answer::Refused(_)) => {}
            None => self.fail(Total::Other, format!("{step:?} was answered by {text}")),
        }
    }

    fn held(&mut self, step: Option<&Step>, held: &[(u64, super::stamp::Content)]) {
        if let Some(Step::Read { volume, .. }) = step {
            self.compared += held.len() as u64;
            for wrong in self.model.read(volume, held) {
                self.fail(Total::LostAcknowledged, wrong);
            }
        }
    }

    /// The first step that was begun and whose acknowledgement does not count.
    fn first_open(
        steps: &[Step],
        said: &[Said],
        begun: &BTreeSet<usize>,
        counts: &impl Fn(usize) -> bool,
    ) -> Option<Step> {
        let good = |number: usize, answer: &Value| match Answer::read(answer) {
            Some(Answer::Done(_)) => true,
            Some(Answer::Refused(why)) => number == 0 && steps.first().is_some_and(|step| step.is_gone(&why)),
            None => false,
        };
        let done = |number: usize| {
            counts(number)
                && said.iter().any(|line| match line {
                    Said::Answered(at, answer) => *at == number && good(number, answer),
                    Said::Written(at) => *at == number,
                    _ => false,
                })
        };
        let open = begun.iter().filter(|number| !done(**number));
        open.filter_map(|number| steps.get(*number)).find(|step| step.kind().is_some()).cloned()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn steps() -> Vec<Step> {
        let create = |volume: &str| Step::Create { volume: volume.into(), size: 1 << 20, template: None };
        vec![create("a"), Step::Check, create("b"), Step::Destroy("a".into())]
    }

    fn said(answers: usize) -> Vec<Said> {
        let done = |number| [Said::Begun(number), Said::Answered(number, json!({"done": "done"}))];
        let mut said: Vec<Said> = (0..answers).flat_map(done).collect();
        said.push(Said::Begun(answers));
        said
    }

    #[test]
    fn what_is_answered_is_acknowledged_and_the_rest_cut_off() {
        let model = Model { pool: crate::crash::model::Pool::Open("p".into()), ..Model::default() };
        let outcome = take(&model, &steps(), &said(3), |_| true, None);
        assert_eq!((outcome.model.volumes.len(), outcome.acknowledged), (2, 2));
        assert_eq!(outcome.cut_off, Some(Step::Destroy("a".into())));
        let outcome = take(&model, &steps(), &said(3), |number| number < 2, None);
        assert_eq!(outcome.model.volumes.len(), 1, "the second one has not happened");
        assert_eq!(outcome.cut_off.as_ref(), Some(&steps()[2]));
        assert!(outcome.failures.is_empty());
    }

    #[test]
    fn a_refusal_and_a_finding_are_failures_unless_the_disk_refused() {
        let refused = json!({"refused": {"reason": "PoolFailed", "message": "x"}});
        let said = [Said::Begun(0), Said::Answered(0, refused)];
        let model = Model::default();
        assert_eq!(take(&model, &steps(), &said, |_| true, None).failures.len(), 1);
        let outcome = take(&model, &steps(), &said, |_| true, Some(0));
        assert_eq!((outcome.failures.len(), outcome.cut_off.as_ref()), (0, Some(&steps()[0])));
        assert_eq!(take(&model, &steps(), &said, |_| true, Some(1)).failures.len(), 1, "it came before");
        let finding = json!({"done": {"findings": [{"kind": "Leaked", "about": "y", "message": "z"}]}});
        let said = [Said::Begun(1), Said::Answered(1, finding)];
        let outcome = take(&model, &steps(), &said, |_| true, None);
        assert_eq!(outcome.failures[0].total, Total::RecordMismatch);
        assert_eq!(outcome.cut_off, None);
    }

    #[test]
    fn what_is_taken_away_again_may_be_gone() {
        let gone = json!({"refused": {"reason": "VolumeNotFound", "message": "x"}});
        let mut model = Model::default();
        model.apply(&Step::TemplateAttach("t".into()));
        let steps = [Step::TemplateDetach("t".into()), Step::TemplateDetach("t".into())];
        let said = |number| [Said::Begun(number), Said::Answered(number, gone.clone())];
        let outcome = take(&model, &steps, &said(0), |_| true, None);
        assert_eq!((outcome.failures.len(), outcome.cut_off), (0, None));
        assert!(outcome.model.templates.is_empty());
        assert_eq!(take(&model, &steps, &said(1), |_| true, None).failures.len(), 1, "it was there before");
    }

    #[test]
    fn half_a_line_is_not_said() {
        assert_eq!(read(b"{\"begun\":1}\n{\"begun\":2"), [Said::Begun(1)]);
        assert_eq!(read(b"\"started\"\n"), [Said::Started]);
    }
}
