  const charts = [...document.querySelectorAll(".js-plotly-plot")];
  const root = document.documentElement;
  const color = name => getComputedStyle(root).getPropertyValue(`--${name}`).trim();

  // A chart has the colors of the page around it, in light, in dark and on paper.
  const paint = chart => {
    const [ink, rule, paper] = ["ink", "rule", "paper"].map(color);
    const layout = {
      "font.color": ink, "hoverlabel.bgcolor": paper, "hoverlabel.font.color": ink, "legend.bgcolor": "rgba(0,0,0,0)",
    };
    for (const axis of Object.keys(chart.layout).filter(key => /^[xy]axis\d*$/.test(key)))
      for (const part of ["gridcolor", "linecolor", "zerolinecolor"]) layout[`${axis}.${part}`] = rule;
    const dark = matchMedia("(prefers-color-scheme: dark)").matches && !root.classList.contains("printing");
    const dots = chart.data.flatMap((trace, i) => trace.meta === "dots" ? [i] : []);
    if (dots.length) Plotly.restyle(chart, { "marker.opacity": dark ? 0.9 : 0.6 }, dots);
    const inked = chart.data.flatMap((trace, i) => trace.meta === "ink" ? [i] : []);
    return Plotly.update(chart, inked.length ? { "line.color": ink, "marker.color": ink } : {}, layout, inked);
  };
  // A chart is drawn when the browser reaches it, before the columns beside it exist: it is fitted to the finished page.
  // One whose axes have the same unit is about as high as it is wide.
  const resize = (chart, width) => {
    if (chart.layout.yaxis.scaleanchor) {
      const colored = chart.data.some(trace => trace.marker?.showscale);
      chart.parentElement.style.height = "auto";  // plotly's own box around it
      chart.style.height = `${Math.min(width, 500) + (colored ? 70 : 0)}px`;
    }
  };
  const fit = () => charts.forEach(chart => {
    resize(chart, chart.clientWidth);
    Plotly.relayout(chart, { autosize: true, width: null, height: null });
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach(paint));

  // A table wider than the screen scrolls by itself; the keyboard reaches it then, and a screen reader names it.
  const reach = () => {
    for (const box of document.querySelectorAll(".scroll")) {
      const wide = box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight;
      if (!wide) ["tabindex", "role", "aria-label"].forEach(name => box.removeAttribute(name));
      else Object.entries({ tabindex: 0, role: "region", "aria-label": `${box.dataset.label}, scrolls` })
        .forEach(([name, value]) => box.setAttribute(name, value));
    }
  };
  let width = innerWidth;
  addEventListener("resize", () => {
    reach();
    if (innerWidth !== width) fit();
    width = innerWidth;
  });
  // To a screen reader the drawing is one picture, with the title and the meaning that stand beside it.
  const describe = chart => {
    const [first, ...others] = chart.querySelectorAll(".main-svg");
    const figure = chart.closest("figure");
    first.setAttribute("role", "img");
    first.setAttribute("aria-labelledby", figure.querySelector("h3").id);
    first.setAttribute("aria-describedby", figure.querySelector("figcaption").id);
    others.forEach(other => other.setAttribute("aria-hidden", true));
  };
  addEventListener("load", () => { charts.forEach(describe); charts.forEach(paint); fit(); reach(); });

  const PAPER = 86 * 96 / 25.4;  // half of its width, in pixels
  // On paper everything is as wide as the paper: charts are drawn anew, and tables that are wider become smaller.
  addEventListener("beforeprint", () => {
    root.classList.add("printing");
    charts.forEach(chart => {
      paint(chart);
      resize(chart, PAPER);
      Plotly.relayout(chart, { autosize: false, width: PAPER, height: chart.clientHeight });
    });
    for (const box of document.querySelectorAll(".scroll")) {
      const table = box.querySelector("table");
      const zoom = table ? Math.min(1, box.clientWidth / table.offsetWidth) : 1;
      if (zoom < 1) table.style.zoom = zoom;
      box.classList.toggle("unreadable", zoom < 0.4);
    }
  });
  addEventListener("afterprint", () => {
    root.classList.remove("printing");
    document.querySelectorAll(".scroll table").forEach(table => table.style.zoom = "");
    charts.forEach(paint);
    fit();
  });

  // What a chart shows, as a table: made when it is opened.
  const plain = html => {
    const template = document.createElement("template");
    template.innerHTML = String(html);
    return template.content.textContent;
  };
  const shown = value => typeof value === "number" ? String(+value.toPrecision(5)) : plain(value ?? "–");
  const tabulate = details => {
    const chart = details.closest("figure").querySelector(".js-plotly-plot");
    const traces = chart.data.filter(trace => trace.x && trace.x.length);
    const named = traces.length > 1, labeled = traces.some(trace => Array.isArray(trace.text));
    const spread = trace => (trace.error_y || trace.error_x || {}).array;
    const ranged = traces.some(spread);
    const title = axis => plain((chart.layout[axis].title || {}).text ?? axis[0]);
    const table = document.createElement("table");
    const add = (row, kind, texts) => texts.forEach((text, i) => {
      const cell = document.createElement(i && kind === "row" ? "td" : "th");
      if (cell.tagName === "TH") cell.scope = kind;
      cell.textContent = text;
      row.append(cell);
    });
    add(table.createTHead().insertRow(), "col", [
      ...named ? ["series"] : [], ...labeled ? ["token"] : [], title("xaxis"), title("yaxis"), ...ranged ? ["±"] : [],
    ]);
    const body = table.createTBody();
    for (const trace of traces)
      trace.x.forEach((x, i) => add(body.insertRow(), "row", [
        ...named ? [plain(trace.name ?? "")] : [], ...labeled ? [shown((trace.text || [])[i])] : [],
        shown(x), shown(trace.y[i]), ...ranged ? [shown((spread(trace) || [])[i])] : [],
      ]));
    const box = document.createElement("div");
    box.className = "scroll";
    box.dataset.label = details.querySelector("summary").textContent;
    box.append(table);
    details.append(box);
    reach();
  };
  document.querySelectorAll("details.data").forEach(
    details => details.addEventListener("toggle", () => details.open && !details.querySelector("table") && tabulate(details)));

  // A click on the heading of a column sorts by it; a second one turns the order round. Empty cells stay last.
  for (const table of document.querySelectorAll("table.sortable")) {
    const headings = [...table.querySelectorAll("thead th[scope=col]")];
    headings.forEach((heading, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      heading.append(button);
      button.addEventListener("click", () => {
        const down = heading.getAttribute("aria-sort") === "ascending";
        headings.forEach(other => other.removeAttribute("aria-sort"));
        heading.setAttribute("aria-sort", down ? "descending" : "ascending");
        const key = row => row.cells[column].textContent.trim();
        const number = text => {  // 6.12 ± 0.01, 1,024, 125M, GPT-2 1.3B
          const size = text.match(/([\d.]+)([MB])$/);
          return size ? size[1] * { M: 1e6, B: 1e9 }[size[2]] : parseFloat(text.replaceAll(",", ""));
        };
        const compare = (a, b) => {
          const [x, y] = [key(a), key(b)], [m, n] = [number(x), number(y)];
          if (x === "–" || y === "–") return (x === "–") - (y === "–");
          const order = Number.isNaN(m) || Number.isNaN(n) ? x.localeCompare(y, "en", { numeric: true }) : m - n;
          return down ? -order : order;
        };
        table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
      });
    });
  }
