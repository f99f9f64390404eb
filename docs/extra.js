// the keyboard reaches tables that scroll sideways
new MutationObserver(() => document.querySelectorAll('.md-typeset__scrollwrap').forEach((e) => { e.tabIndex = 0 }))
  .observe(document.documentElement, { childList: true, subtree: true })
