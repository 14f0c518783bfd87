"""The page's CSS: light and dark, narrow screens, print."""

CSS = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5d666f; --line: #d8dde2; --card: #f4f6f8;
  --page: #fff; --blue: #2b6cb0 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #a2abb4; --line: #3a4149; --card: #22272c; --page: #16191c;
    --blue: #7db4ea }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: var(--ink);
  background: var(--page); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2 }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; border-bottom: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem }
p, figcaption { max-width: 44rem }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(13rem, 100%), 1fr));
  gap: .75rem }
.cards > div { background: var(--card); border-radius: .5rem; padding: .75rem 1rem }
.cards dt { color: var(--soft) }
.cards dd { margin: 0; font-size: .9rem }
.cards strong { font-size: 1.6rem }
.interval { color: var(--soft); white-space: nowrap }
.wide { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding: .25rem 0 }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; white-space: nowrap }
tr > :first-child, td:only-of-type { text-align: left; white-space: normal; min-width: 7rem;
  max-width: 22rem }
tbody th { font-weight: 400 }
thead :nth-child(2):last-child { text-align: left }
ol { columns: 24rem; column-gap: 3rem; padding-left: 2rem }
figure { margin: 1rem 0 }
svg { max-width: 100%; height: auto }
svg image { image-rendering: pixelated }
figcaption { font-size: .9rem; color: var(--soft) }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr));
  gap: 1rem }
.pictures figure { margin: 0; break-inside: avoid }
.pictures img, .gone { width: 100%; height: 10rem; object-fit: contain; background: var(--card) }
.gone { display: grid; place-items: center; padding: 1rem; color: var(--soft) }
.pictures figcaption b { color: var(--ink) }
summary { cursor: pointer; color: var(--blue) }
@media print {
  body { max-width: none; padding: 0; font-size: 11px }
  .wide { overflow: visible }
  tr, .cards > div, svg { break-inside: avoid }
}
"""
