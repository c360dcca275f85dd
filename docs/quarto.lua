--[[ The part of Quarto's markdown that the notebooks use, as a pandoc filter:

     $$ ... $$ {#eq-x}, @eq-x, @fig-x, @tbl-x, @sec-x    numbered equations, figures, tables; references to them
     ::: {.callout-note title="..."}                     callouts, folded with collapse="true"
     ::: {.panel-tabset}                                 tabs, one for each heading inside
     [text](02_other.ipynb#anchor)                       links between notebooks

   and three divs that cells.py writes: .float (a labelled output), .fold (folded code), .api (a documented name).
   What cannot be resolved is written to stderr, which the builder treats as an error. ]]

local stringify = pandoc.utils.stringify
local WORDS = {eq = 'Equation', fig = 'Figure', tbl = 'Table', sec = '§'}

local context = {}                      -- what the builder knows: the folder, the way to the root, pages, names
local number = {}                       -- label -> what a reference to it says
local count = {eq = 0, fig = 0, tbl = 0}

local function problem(text) io.stderr:write(text .. '\n') end
local function raw(html) return pandoc.RawBlock('html', html) end
local function escape(s) return (s:gsub('&', '&amp;'):gsub('<', '&lt;'):gsub('>', '&gt;'):gsub('"', '&quot;')) end
local function kind_of(label) return label:match('^(%a+)%-') end

local function next_number(label)
  local kind = kind_of(label)
  if number[label] then problem('the label ' .. label .. ' is used twice') end
  count[kind] = count[kind] + 1
  number[label] = tostring(count[kind])
  return number[label]
end

-- ---- first pass: give out the numbers, in reading order -------------------------------------------------------------

local function equation(math, label)
  local content = {pandoc.Span({math}, {class = 'eq-body'})}
  if label then content[2] = pandoc.Span('(' .. next_number(label) .. ')', {class = 'eq-num'}) end
  return pandoc.Span(content, pandoc.Attr(label or '', {'equation'}, {['data-pagefind-ignore'] = ''}))  -- an excerpt cannot show it
end

-- a display equation, then perhaps a space and the text {#eq-x}, to which punctuation may be glued
local function equations(block)
  local out, i, x = pandoc.List(), 1, block.content
  while i <= #x do
    if x[i].t == 'Math' and x[i].mathtype == 'DisplayMath' then
      local j = i + 1
      if x[j] and (x[j].t == 'Space' or x[j].t == 'SoftBreak') then j = j + 1 end
      local label, rest
      if x[j] and x[j].t == 'Str' then label, rest = x[j].text:match('^{#(eq%-[%w_-]+)}(.*)$') end
      out:insert(equation(x[i], label))
      if label then
        if rest ~= '' then out:insert(pandoc.Str(rest)) end
        i = j
      end
    else
      out:insert(x[i])
    end
    i = i + 1
  end
  block.content = out
  return block
end

local function caption(blocks, label)
  local text = pandoc.Strong(WORDS[kind_of(label)] .. '\u{a0}' .. next_number(label))
  if blocks[1] and blocks[1].content then
    blocks[1].content:insert(1, pandoc.Str('. '))
    blocks[1].content:insert(1, text)
  else
    blocks:insert(1, pandoc.Plain({text}))
  end
end

local function number_table(t)
  for _, spec in ipairs(t.colspecs) do spec[2] = nil end    -- let the browser set the widths of the columns
  if kind_of(t.identifier) == 'tbl' then caption(t.caption.long, t.identifier) end
  return t
end

local function number_float(div)
  if not div.classes:includes('float') then return nil end
  for _, block in ipairs(div.content) do
    if block.t == 'Div' and block.classes:includes('caption') then caption(block.content, div.identifier) end
  end
  return div
end

local function number_figure(figure)
  if kind_of(figure.identifier) ~= 'fig' then return nil end
  caption(figure.caption.long, figure.identifier)
  return figure
end

-- In a notebook a list may follow a line of text at once; in pandoc's markdown it would go on as text.
local function glued(block)
  for i, x in ipairs(block.content) do
    local after = block.content[i + 1]
    if x.t == 'SoftBreak' and after and after.t == 'Str' then
      local s = after.text
      if s == '-' or s == '*' or s == '+' or s == '|' or s:match('^#+$') or s:match('^%d+[.)]$') then
        problem('a list, table or heading needs a blank line before it: ' .. stringify(block):sub(1, 80))
      end
    end
  end
end

-- A section is called by its title. A heading of the same name as a documented function gives way to it: the links that
-- nbdev makes point to the function.
local function headings(doc)
  local documented = {}
  doc:walk({Div = function(d)
    if d.classes:includes('api') then for name in d.attributes.names:gmatch('%S+') do documented[name] = true end end
  end})
  return doc:walk({Header = function(h)
    if kind_of(h.identifier) == 'sec' then number[h.identifier] = stringify(h.content) end
    if h.classes:includes('api-name') then
      h.identifier, h.attributes.anchor = h.attributes.anchor, nil
    elseif documented[h.identifier] then
      h.identifier = 'section-' .. h.identifier
    end
    return h
  end})
end

-- ---- second pass: references, divs, links ---------------------------------------------------------------------------

-- @eq-x -> "Equation 1"; [Eq. @eq-x] -> "Eq. 1"; [-@eq-x] -> "1"
local function reference(cite)
  if not WORDS[kind_of(cite.citations[1].id) or ''] then return nil end
  local out = pandoc.List()
  for i, c in ipairs(cite.citations) do
    local n = number[c.id]
    if not n then problem('unresolved cross-reference @' .. c.id) end
    local text = pandoc.List()
    if #c.prefix > 0 then text:extend(c.prefix)
    elseif c.mode ~= 'SuppressAuthor' then text:insert(pandoc.Str(WORDS[kind_of(c.id)] or '?')) end
    if #text > 0 then text:insert(pandoc.Str('\u{a0}')) end
    text:insert(pandoc.Str(n or '?'))
    if i > 1 then out:insert(pandoc.Str(', ')) end
    out:insert(pandoc.Link(text, '#' .. c.id, '', {class = 'xref'}))
  end
  return out
end

local function wrap(open, blocks, close)
  local out = pandoc.List({raw(open)})
  out:extend(blocks)
  out:insert(raw(close))
  return out
end

local function callout(div, kind)
  local body = div.content
  local title = pandoc.Inlines({pandoc.Str(kind:sub(1, 1):upper() .. kind:sub(2))})
  if div.attributes.title then
    title = pandoc.utils.blocks_to_inlines(pandoc.read(div.attributes.title, 'markdown').blocks)
  elseif body[1] and body[1].t == 'Header' then
    title = body[1].content
    body:remove(1)
  end
  local label = div.identifier ~= '' and ' id="' .. escape(div.identifier) .. '"' or ''
  local open, middle, close = '<div role="note"%s class="callout callout-%s"><p class="callout-title">',
    '</p><div class="callout-body">', '</div></div>'
  if div.attributes.collapse then
    open, middle, close = '<details%s class="callout callout-%s"' .. (div.attributes.collapse == 'false' and ' open' or '')
      .. '><summary class="callout-title">', '</summary><div class="callout-body">', '</div></details>'
  end
  local blocks = pandoc.List({pandoc.Plain(title), raw(middle)})
  blocks:extend(body)
  return wrap(open:format(label, kind), blocks, close)
end

-- Tabs are radio buttons and their labels: they work without a script.
local tabsets = 0
local function tabset(div)
  tabsets = tabsets + 1
  local out, n, level = pandoc.List(), 0, nil
  for _, block in ipairs(div.content) do
    if block.t == 'Header' and (not level or block.level == level) then
      level, n = block.level, n + 1
      if n > 1 then out:insert(raw('</div>')) end
      local id = ('tab%d-%d'):format(tabsets, n)
      out:insert(raw(('<input type="radio" name="tabs%d" id="%s"%s><label for="%s">%s</label><div class="tab">')
        :format(tabsets, id, n == 1 and ' checked' or '', id, escape(stringify(block.content)))))
    else
      out:insert(block)
    end
  end
  if n == 0 then problem('a .panel-tabset needs a heading for each tab') end
  return wrap('<div class="tabs">', out, '</div></div>')
end

local function fold(div)
  local open = div.attributes.open == 'true' and ' open' or ''
  return wrap('<details class="fold"' .. open .. '><summary>' .. escape(div.attributes.summary) .. '</summary>',
    div.content, '</details>')
end

local function division(div)
  if div.classes:includes('fold') then return fold(div) end
  if div.classes:includes('panel-tabset') then return tabset(div) end
  -- raw tags rather than a Div: pandoc leaves the headings of a Div out of the table of contents
  if div.classes:includes('api') then return wrap('<div class="api">', div.content, '</div>') end
  for _, class in ipairs(div.classes) do
    local kind = class:match('^callout%-(%a+)$')
    if kind then return callout(div, kind) end
  end
end

-- a path relative to this page's folder, as a path from the root of the site
local function from_root(path)
  local parts = {}
  for part in (context.folder .. '/' .. path):gmatch('[^/]+') do
    if part == '..' then table.remove(parts) elseif part ~= '.' then parts[#parts + 1] = part end
  end
  return table.concat(parts, '/')
end

local function link(l)
  if l.target:sub(1, #context.site) == context.site then
    local text = l.content[1]
    local name = #l.content == 1 and text.t == 'Code' and text.text:gsub('%(%)$', '')
    local target = name and context.names[name]
    if target == '' then return text end                    -- nbdev guessed, and the name means nothing on this page
    l.target = context.root .. (target or l.target:sub(#context.site + 1))
    return l
  end
  local path, anchor = l.target:match('^([^#:]+%.ipynb)(#?.*)$')
  if path then
    local page = context.pages[from_root(path)]
    if not page then problem('a link to the unknown notebook ' .. path); return nil end
    l.target = context.root .. page .. anchor
    return l
  end
end

-- A browser may break a line before and after a formula: tie it to the bracket before it and to the punctuation after it.
local function ties(inlines)
  local out, i = pandoc.List(), 1
  while i <= #inlines do
    local x, before, after = inlines[i], out[#out], inlines[i + 1]
    if x.t == 'Math' and x.mathtype == 'InlineMath' then
      local tied = pandoc.List({x})
      local opening = before and before.t == 'Str' and before.text:match('[(%[]$')
      if opening then
        before.text = before.text:sub(1, -2)
        tied:insert(1, pandoc.Str(opening))
      end
      local closing, rest
      if after and after.t == 'Str' then closing, rest = after.text:match('^([.,;:!?)%]]+)(.*)$') end
      if closing then
        tied:insert(pandoc.Str(closing))
        after.text = rest
      end
      out:insert(#tied > 1 and pandoc.Span(tied, {class = 'tied'}) or x)
    elseif not (x.t == 'Str' and x.text == '') then
      out:insert(x)
    end
    i = i + 1
  end
  return out
end

local function scrolling(t)
  return wrap('<div class="scroll" tabindex="0" role="region" aria-label="Table">', {t}, '</div>')
end

local function code(block)
  block.text = block.text:gsub('^%s*\n', ''):gsub('%s+$', '')
  return block
end

-- pandoc's HTML writer would drop these silently
local function raw_tex(el)
  if el.format == 'tex' or el.format == 'latex' then problem('TeX outside of $…$ or $$…$$: ' .. el.text) end
end

local function read_context(meta)
  local file = assert(io.open(stringify(meta.context)))
  context = pandoc.json.decode(file:read('a'), false)
  file:close()
end

return {
  {Meta = read_context, RawInline = raw_tex, RawBlock = raw_tex},
  {Pandoc = headings},
  {Para = glued},
  {traverse = 'topdown', Para = equations, Plain = equations, Table = number_table, Div = number_float, Figure = number_figure},
  {Cite = reference, Div = division},
  {Link = link, CodeBlock = code, Table = scrolling, Inlines = ties},
}
