"""The words and the style sheet of the report page."""

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #222; background: #fff;
  max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
h3 { font-size: 1rem; margin: 1rem 0 0.3rem; }
h1, h2, h3, p, li, td:last-child { overflow-wrap: anywhere; }
figure { margin: 1rem 0; } figure img { width: 100%; height: auto; }
figcaption, summary { color: #555; font-size: 0.9rem; }
.answer { background: #eef5fa; border-left: 4px solid #0072b2; padding: 0.7rem 1rem; }
.scroll { overflow: auto; max-height: 40rem; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.6rem; border-bottom: 1px solid #e4e4e4; text-align: right;
  white-space: nowrap; }
th { position: sticky; top: 0; background: #f4f4f4; }
td:last-child, th:last-child { text-align: left; white-space: normal; }
table.pairs td:first-child { text-align: left; color: #555; }
tr.bad td { background: #fdf0e6; }
pre { background: #f4f4f4; padding: 0.7rem; overflow: auto; }
@media (max-width: 50rem) { th, td { padding: 0.2rem 0.35rem; font-size: 0.8rem; } }
@media print { .scroll { max-height: none; overflow: visible; } pre { white-space: pre-wrap; }
  figure { break-inside: avoid; } }
"""

NO_STAGES = "Its curve was not cut into stages."
STAGES = (
    "Δloss is the change of the loss on the data set of the estimates, Δλ̂ that of the smooth curve."
    " A boundary is given with its probability and the interval that holds it with 68 %. The kind"
    " is by λ̂ alone: a rise is what arXiv:2402.02364 calls type A, a fall type B; flat is a change"
    " within its error."
)
HOW_TO_READ = (
    "λ̂, the local learning coefficient, measures how degenerate the loss is around a checkpoint:"
    " the fewer directions raise the loss, the lower it is. A quadratic minimum in d directions"
    " has λ = d/2.",
    "Its value belongs to the settings it was taken at, here nbeta {nbeta} and localization"
    " {localization}. Compare the checkpoints of one page with each other, and never values taken"
    " at different settings.",
    "A negative value is no mistake of arithmetic: chains found lower losses than the checkpoint's"
    " own, so it is no local minimum (a saddle, or training still descends). Nothing is clipped.",
    "The standard error covers the randomness of the chains only, neither that of training nor the"
    " bias of a finite step size.",
    "R-hat near 1 and many effective draws (ESS) say that the chains agree and mix. The acceptance"
    " is that of a Metropolis test of the same steps; it is low if they are too large.",
)
HEADINGS = {
    "traces": "Chains",
    "tokens": "λ̂ of every token",
    "curvature": "Curvature",
    "octaves": "λ̂ of early and late tokens",
    "behavior": "Behaviour",
    "language": "Behaviour",
    "heads": "Heads",
    "structure": "Structure",
    "trajectory": "Path in function space",
    "metrics": "Metrics",
}
CAPTIONS = {
    "overview": "Above, the training loss; below, λ̂ at each checkpoint with its standard error"
    " and a smooth curve through the points. Stages are shaded: blue rises, orange falls, grey is"
    " level. The stronger a boundary's line, the more certain it is; the bar at its foot is its"
    " 68 % interval.",
    "traces": "Chains at the first, the middle and the last checkpoint. Above, the loss of every"
    " draw (thin) and its moving average (thick); chains that have settled are level after the"
    " burn-in and lie on top of each other. Below, what each chain's λ̂ would have been, had it"
    " stopped there.",
    "tokens": "λ̂ of the loss at each example, from the same chains; their mean is that of the whole"
    " loss.",
    "octaves": "λ̂ of the mean loss over tokens at some places of a sequence, from the same chains;"
    " weighted by how many tokens there are, they add up to that of the whole loss.",
    "language": "What the model does. Loss on held-out sequences, as it is and with the position"
    " embedding set to 0; cross-entropy of its predictions with the law of pairs of words, which is"
    " least for a model that knows these alone; loss at the last token of n-grams, given only the"
    " others, against the loss of any token at that place: above 1 the model knows them; and how"
    " much lower the loss is late in a sequence than early.",
    "heads": "What attention heads look at, on random sequences: the previous token; what followed"
    " an earlier occurrence of the word, of which there is one, or a whole block of them.",
    "behavior": "What the model does. Loss at each example, with that of the optimal predictor"
    " (ridge) dotted; the mean square of the predictions, small where the model predicts the mean"
    " of the task prior, zero; their distance to those of ridge, and where tasks come from a finite"
    " set to those of the optimal predictor for it; how much lower the loss is at a late example"
    " than at an early one; and the same for the last and the first, for larger inputs. All"
    " checkpoints see the same sequences: others would shift whole curves by about one standard"
    " error.",
    "structure": "How the model is built: norm of all weights; channels that the layer norms have"
    " switched off; shares of the singular values of both embeddings, squared; how much of the"
    " token embedding lies in the span of the position embeddings; and the map from the last layer"
    " norm to the prediction.",
    "metrics": "What the problem measures at every checkpoint, under the stages of λ̂.",
    "trajectory": "The predictions on fixed sequences (of a language model the logit or the"
    " log-probability of the next token at one place of each), projected on their principal"
    " components over the run (dots: checkpoints). Circles touch the path; the thin"
    " line through their centres is its evolute; both are left out if there are few checkpoints."
    " Below, the components over training.",
    "curvature": "Curvature at the checkpoints themselves, under λ̂ and its stages. What λ̂ would"
    " be if the loss were its quadratic form around the checkpoint, at the same nbeta and"
    " localization: where the two differ, second order misses something. Below, trace and"
    " eigenvalues of the Hessian of the mean loss; bars are standard errors over random probes,"
    " and residuals for the eigenvalues.",
}
