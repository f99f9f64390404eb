// the keyboard reaches tables that scroll sideways
new MutationObserver(() => document.querySelectorAll('.md-typeset__scrollwrap').forEach((e) => { e.tabIndex = 0 }))
  .observe(document.documentElement, { childList: true, subtree: true })

// in the search a leading dash would exclude a word, and flags begin with dashes
document.addEventListener('input', (event) => {
  if (!event.target.matches('[data-md-component="search-query"]')) return
  const without = event.target.value.replace(/(^|\s)[-\u2013\u2014]+(?=\w)/g, '$1')
  if (without !== event.target.value) event.target.value = without
}, true)
