"""From records to tables, figures and one page: nothing here trains anything, or imports torch.

`build.build` writes everything, `build.check` says what is stale, `console.text` prints a few records,
`published.compare` sets ours beside a paper's numbers, `page.page_html` makes one self-contained HTML file. Import the
module you need: the console table must not wait for the plotting library.
"""
