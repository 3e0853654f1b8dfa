// A page follows the server's state: on each word from the stream, the same page is asked for again and the parts
// marked `data-live` (each with an id) take the place of the old ones. Nothing that was read is run as code. What the
// reader has open, has focused and has scrolled to stays.
"use strict";

(() => {
  const address = document.body.dataset.events;
  const connection = document.getElementById("connection");
  const news = document.getElementById("news");
  let busy = false;
  let again = false;

  const opened = () => new Set([...document.querySelectorAll("details[open]")].map(placeOf));

  // Where a part lies: the ids above it, and its number below the nearest.
  function placeOf(details) {
    const holder = details.closest("[id]");
    return holder.id + "/" + [...holder.querySelectorAll("details")].indexOf(details);
  }

  function replace(fresh) {
    const open = opened();
    const focused = document.activeElement && document.activeElement.id;
    const scrolled = [...document.querySelectorAll(".scroll")].map((node) => [node.scrollLeft, node.scrollTop]);
    for (const old of document.querySelectorAll("[data-live][id]")) {
      const found = fresh.getElementById(old.id);
      if (found && found.innerHTML !== old.innerHTML) {
        old.replaceChildren(...document.importNode(found, true).childNodes);
      }
    }
    for (const details of document.querySelectorAll("details")) {
      if (open.has(placeOf(details))) details.open = true;
    }
    document.querySelectorAll(".scroll").forEach((node, index) => {
      if (scrolled[index]) [node.scrollLeft, node.scrollTop] = scrolled[index];
    });
    if (focused && document.getElementById(focused)) document.getElementById(focused).focus({ preventScroll: true });
    document.title = fresh.title;
  }

  async function refresh(text) {
    if (busy) {
      again = true;
      return;
    }
    busy = true;
    try {
      const answer = await fetch(location.href, { headers: { accept: "text/html" }, credentials: "same-origin" });
      if (answer.redirected || answer.status === 401) {
        location.reload(); // the session has ended: the login page says so
        return;
      }
      // An answer that is an error page (a ledger that no longer verifies) is shown whole.
      replace(new DOMParser().parseFromString(await answer.text(), "text/html"));
      if (text) news.textContent = text;
    } catch {
      connection.hidden = false;
    } finally {
      busy = false;
      if (again) {
        again = false;
        refresh("");
      }
    }
  }

  let known = document.body.dataset.version || null;
  let silence = null;

  // A stream that ends is opened again by the browser; only when that takes longer is it worth a word.
  function quiet() {
    if (silence === null) silence = setTimeout(() => { connection.hidden = false; }, 3000);
  }

  function heard(event) {
    clearTimeout(silence);
    silence = null;
    connection.hidden = true;
    const state = JSON.parse(event.data);
    if (known !== state.version) refresh(state.news);
    known = state.version;
  }

  function follow() {
    const stream = new EventSource(address);
    stream.addEventListener("state", heard);
    stream.onerror = () => {
      quiet();
      if (stream.readyState === EventSource.CLOSED) setTimeout(follow, 5000); // refused: the browser gives up, we do not
    };
  }

  follow();
})();
