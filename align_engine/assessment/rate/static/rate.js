// Keys for the buttons of the page, and the order of answers by digits. Without it the page works by its buttons.
"use strict";
(() => {
  const form = document.getElementById("mark");
  const selects = form ? [...form.querySelectorAll("select[data-answer]")] : [];
  const order = []; // numbers of the answers, the best first; [number, tied with the one before]

  const again = document.querySelector("a[data-again]");
  if (again) setTimeout(() => location.replace(again.href), 5000); // a run may have brought more

  let sent = false;
  for (const one of document.querySelectorAll("form")) {
    one.addEventListener("submit", (event) => {
      if (sent) event.preventDefault(); // a second click while the first one is under way
      sent = true;
    });
  }
  window.addEventListener("pageshow", () => { sent = false; });

  function place() {
    let rank = 0;
    for (const select of selects) select.value = "";
    order.forEach(([number, tied], i) => {
      rank = tied && i ? rank : i + 1;
      selects[number - 1].value = String(rank);
    });
  }

  // a letter by the key's place (other scripts have others there), a digit by its sign or else by its place
  function code(event) {
    const digit = /^[0-9]$/.test(event.key) ? event.key : /^(?:Digit|Numpad)([0-9])$/.exec(event.code)?.[1];
    return digit ? "Digit" + digit : event.key === "Enter" ? "Enter" : event.code;
  }

  let tie = false;
  function ranked(event) {
    const number = Number(code(event).replace("Digit", ""));
    if (number >= 1 && number <= selects.length) {
      if (!order.some(([one]) => one === number)) order.push([number, tie]);
      tie = false;
    } else if (event.key === "=") tie = true;
    else if (event.key === "Backspace") order.pop();
    else return false;
    place();
    return true;
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    const field = event.target.closest("textarea, select, input");
    if (event.key === "Escape" && field) return field.blur();
    if (field || event.repeat) return;
    const inside = event.target.closest("button, summary, a");
    if (event.key === "Enter" && inside) return; // it presses what has the focus
    if (selects.length && ranked(event)) return event.preventDefault();
    const button = document.querySelector(`[data-key="${CSS.escape(code(event))}"]`);
    if (!button) return;
    event.preventDefault();
    if (button.tagName === "SUMMARY") {
      button.parentElement.open = true;
      button.parentElement.querySelector("textarea").focus();
    } else button.click();
  });
})();
