// Theme, menu, copy buttons, the heading in view, search. The pages can be read without any of it.
(() => {
  const $ = selector => document.querySelector(selector), $$ = selector => [...document.querySelectorAll(selector)];
  const make = (tag, properties) => Object.assign(document.createElement(tag), properties);
  const root = document.currentScript.dataset.root;

  // ---- theme: the system's, until the reader chooses
  $('#page-theme').onclick = () => {
    const html = document.documentElement;
    const dark = html.dataset.theme ? html.dataset.theme === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
    html.dataset.theme = dark ? 'light' : 'dark';
    try { localStorage.theme = html.dataset.theme; } catch { /* private window: the choice lasts as long as the page */ }
  };

  // ---- menu on a narrow screen
  const menu = $('#page-menu'), side = $('.side');
  const showMenu = open => { side.classList.toggle('open', open); menu.setAttribute('aria-expanded', open); };
  menu.onclick = () => showMenu(!side.classList.contains('open'));
  addEventListener('keydown', e => { if (e.key === 'Escape' && side.classList.contains('open')) { showMenu(false); menu.focus(); } });
  side.querySelector('[aria-current]')?.scrollIntoView({block: 'nearest'});

  // ---- copy buttons, links to headings
  for (const block of $$('div.sourceCode')) {
    const button = make('button', {className: 'copy', type: 'button', textContent: 'Copy'});
    button.onclick = async () => {
      await navigator.clipboard.writeText(block.querySelector('code').innerText);
      button.textContent = 'Copied';
      setTimeout(() => button.textContent = 'Copy', 1200);
    };
    block.append(button);
  }
  for (const h of $$('article :is(h2, h3, h4)[id]'))
    h.append(make('a', {className: 'anchor', href: '#' + h.id, textContent: '#', ariaLabel: 'Link to this heading'}));

  // ---- when the fonts are there: a formula in the text that is wider than the text gets a line of its own, which scrolls;
  // and what scrolls can be reached by the keyboard
  document.fonts.ready.then(() => {
    for (const math of $$('article :is(p, li, dd) math:not([display=block])')) {
      const room = math.closest('p, li, dd').clientWidth, whole = math.closest('.tied') ?? math;
      if (!room || math.getBoundingClientRect().width <= room) continue;
      const box = make('span', {className: 'wide-formula'});
      whole.replaceWith(box);
      box.append(whole);
    }
    for (const e of $$('pre, .equation, .output-html, .picture, .wide-formula')) if (e.scrollWidth > e.clientWidth + 1) e.tabIndex = 0;
  });

  // ---- the heading in view
  const links = new Map($$('.toc a').map(a => [decodeURIComponent(a.hash.slice(1)), a]));
  const headings = $$('article :is(h2, h3)[id]').filter(h => links.has(h.id));
  if (headings.length) {
    const update = () => {
      const passed = headings.filter(h => h.getBoundingClientRect().top < 120);
      const current = (passed.at(-1) ?? headings[0]).id;
      for (const [id, a] of links) a.classList.toggle('on', id === current);
    };
    addEventListener('scroll', update, {passive: true});
    update();
  }

  // ---- search: Pagefind, loaded when it is first needed
  const finder = $('#page-finder'), box = finder.querySelector('input'), hits = finder.querySelector('.hits');
  let pagefind;
  const load = () => pagefind ??= import(new URL(root + 'pagefind/pagefind.js', location.href)).then(p => (p.init?.(), p));
  const open = () => {
    finder.showModal();
    box.select();
    load().catch(() => { pagefind = undefined; hits.textContent = 'Search needs the site to be served over http.'; });
  };
  const results = pages => pages.flatMap(page => {
    const parts = page.sub_results.length ? page.sub_results.slice(0, 3) : [page];
    return parts.map(part => {
      const a = make('a', {href: part.url}), where = part.title?.replace(/#$/, '');
      a.append(make('b', {textContent: page.meta.title}));
      if (where && where !== page.meta.title) a.append(make('i', {textContent: ' › ' + where}));
      a.append(make('p', {innerHTML: part.excerpt}));  // escaped by Pagefind, but for its <mark>
      return a;
    });
  });
  box.oninput = async () => {
    const term = box.value.trim();
    if (!term) return hits.replaceChildren();
    const found = await (await load()).debouncedSearch(term, {}, 120);
    if (!found) return;  // a later key has taken over
    const pages = await Promise.all(found.results.slice(0, 10).map(r => r.data()));
    if (term === box.value.trim()) hits.replaceChildren(...(pages.length ? results(pages) : [make('p', {textContent: `Nothing found for “${term}”.`})]));
  };
  $('#page-search').onclick = open;
  finder.onclick = e => { if (e.target === finder) finder.close(); };
  finder.querySelector('button').onclick = () => finder.close();
  finder.querySelector('form').onsubmit = e => { e.preventDefault(); hits.querySelector('a')?.click(); };
  addEventListener('keydown', e => {
    const typing = e.target.matches?.('input, textarea, select, [contenteditable]');
    if ((e.key === '/' && !typing && !e.ctrlKey && !e.metaKey) || (e.key === 'k' && (e.ctrlKey || e.metaKey))) { e.preventDefault(); if (!finder.open) open(); }
    if (finder.open && (e.key === 'ArrowDown' || e.key === 'ArrowUp')) {
      const all = [...hits.querySelectorAll('a')], i = all.indexOf(document.activeElement) + (e.key === 'ArrowDown' ? 1 : -1);
      e.preventDefault();
      (i < 0 ? box : all[Math.min(i, all.length - 1)])?.focus();
    }
  });
})();
